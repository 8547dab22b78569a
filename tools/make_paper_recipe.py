"Write recipes/paper.sh: every method on one backbone, with what `strlora plan` says of memory and time above each command."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_paper_specs import FOLDER, METHODS

from strlora.plan import Setup, planned, tokens_of
from strlora.sizes import sizes
from strlora.spec import load, resolve

FILE = FOLDER.parents[1] / "recipes" / "paper.sh"
BACKBONE, GPUS, MEMORY = "internvl3_5_8b", 4, 80.0

HEAD = """#!/usr/bin/env bash
# The study of the paper on one backbone: recipes/paper.sh [internvl3_5_8b | internvl3_5_4b | gemma3_4b]
# Needs the weights under models/BACKBONE. Written by tools/make_paper_recipe.py.
# GPUS=8 takes more GPUs; a step keeps its 32 samples whatever their number, which must divide train.accumulation.
# Memory and hours are estimates for {gpus} GPUs of {memory:g} GB and the largest pictures, without evaluation, of
#     strlora plan experiments/paper/{backbone}/METHOD.toml --gpus {gpus}x{memory:g}
# Finished runs are kept, interrupted ones resume.
set -euo pipefail
cd "$(dirname "$0")/.."
BACKBONE=${{1:-{backbone}}} GPUS=${{GPUS:-{gpus}}} MEMORY=${{MEMORY:-{memory:g}}} CONFIG=${{CONFIG:-recipes/ddp.yaml}}
export PATH="$PWD/.venv/bin:$PATH"

once() {{  # METHOD: plan, then run, or resume what is there
    local spec=experiments/paper/$BACKBONE/$1.toml folder=results/paper/$BACKBONE/$1/seed42
    strlora plan "$spec" --gpus "${{GPUS}}x$MEMORY"
    launch=(accelerate launch --config_file "$CONFIG" --num_processes "$GPUS" "$(command -v strlora)")
    if [ ! -e "$folder/run.json" ]; then "${{launch[@]}}" run "$spec" --out "$folder"
    elif ! grep -q '"status": "finished"' "$folder/run.json"; then "${{launch[@]}}" resume "$folder"; fi
}}
"""


def remark(method: str) -> str:
    "What the plan says of one method."
    spec = resolve(load(FOLDER / BACKBONE / f"{method}.toml"))
    s = sizes(spec)
    setup = Setup(GPUS, MEMORY, "ddp", tokens_of(s), spec.train.batch_size, spec.train.gradient_checkpointing)
    plan = planned(spec, s, setup)
    steps = plan["course"]["steps"]
    course = f"{steps} steps, {plan['course']['hours']:.1f} h" if steps else "no training"
    return f"# {plan['memory_total'] / 1e9:.0f} GB a GPU, {course}"


def text() -> str:
    "The script."
    head = HEAD.format(backbone=BACKBONE, gpus=GPUS, memory=MEMORY)
    return "\n".join([head, *(f"{remark(method)}\nonce {method}" for method in METHODS), "",
                      'strlora report "results/paper/$BACKBONE"/*/seed42']) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    FILE.chmod(0o755)
