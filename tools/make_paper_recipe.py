"Write recipes/paper.sh: every method on one backbone, with what `strlora plan` says of memory and time above each command."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_paper_specs import FOLDER, METHODS

from strlora.duration import Setup, tokens_of
from strlora.plan import planned
from strlora.sizes import sizes
from strlora.spec import load, resolve

FILE = FOLDER.parents[1] / "recipes" / "paper.sh"
BACKBONE, GPUS, MEMORY = "internvl3_5_8b", 4, 80.0

ORDER = ("zero_shot", *(m for m in METHODS if m not in ("zero_shot", "joint")), "joint")  # the cheapest first, the most demanding last

HEAD = """#!/usr/bin/env bash
# The study of the paper on one backbone: recipes/paper.sh [internvl3_5_8b | internvl3_5_4b | gemma3_4b]
# Needs the weights under models/BACKBONE. Written by tools/make_paper_recipe.py.
# GPUS=8 takes more GPUs; a step keeps its 32 samples whatever their number, which must divide train.accumulation.
# CONFIG=recipes/fsdp2.yaml shares the frozen weights among smaller GPUs, MEMORY=40 says how many GB each has.
# Memory and hours of training are estimates for {gpus} GPUs of {memory:g} GB and the largest pictures, of
#     strlora plan experiments/paper/{backbone}/METHOD.toml --gpus {gpus}x{memory:g} --strategy ddp
# Hours of evaluation depend on the files; the plan that is printed before each run counts their questions.
# Finished runs are kept, interrupted ones resume. A method that fails is named at the end; the others go on.
set -euo pipefail
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$(dirname "$0")/.."
BACKBONE=${{1:-{backbone}}} GPUS=${{GPUS:-{gpus}}} MEMORY=${{MEMORY:-{memory:g}}} CONFIG=${{CONFIG:-recipes/ddp.yaml}}
export PATH="$PWD/.venv/bin:$PATH"
launch=(accelerate launch --config_file "$CONFIG" --num_processes "$GPUS" -m strlora)
finished=() failed=()

is_finished() {{ grep -qs '"status": "finished"' "$1/run.json"; }}

once() {{  # METHOD: plan, then run, or resume what is there
    local spec=experiments/paper/$BACKBONE/$1.toml folder=results/paper/$BACKBONE/$1/seed42
    local words=(run "$spec" --out "$folder")
    if [ -e "$folder/run.json" ]; then words=(resume "$folder"); fi
    if strlora plan "$spec" --gpus "${{GPUS}}x$MEMORY" --strategy "$(basename "$CONFIG" .yaml)" &&
        {{ is_finished "$folder" || "${{launch[@]}}" "${{words[@]}}"; }}
    then finished+=("$folder"); else failed+=("$1"); fi
}}
"""

TAIL = """
if [ ${#finished[@]} -gt 0 ]; then strlora report "${finished[@]}" || failed+=(report); fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "paper.sh: ${#failed[@]} failed: ${failed[*]}" >&2
    exit 1
fi
"""


def remark(method: str) -> str:
    "What the plan says of one method."
    spec = resolve(load(FOLDER / BACKBONE / f"{method}.toml"))
    s = sizes(spec)
    setup = Setup(GPUS, MEMORY, "ddp", tokens_of(s, spec.train.max_length), spec.train.batch_size, spec.train.gradient_checkpointing)
    plan = planned(spec, s, setup)
    steps = plan["course"]["steps"]
    course = f"{steps} steps, {plan['course']['hours']:.1f} h" if steps else "no training"
    return f"# {plan['memory_total'] / 1e9:.0f} GB a GPU, {course}"


def text() -> str:
    "The script."
    head = HEAD.format(backbone=BACKBONE, gpus=GPUS, memory=MEMORY)
    return "\n".join([head, *(f"{remark(method)}\nonce {method}" for method in ORDER), TAIL])


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    FILE.chmod(0o755)
