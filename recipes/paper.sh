#!/usr/bin/env bash
# The study of the paper on one backbone: recipes/paper.sh [internvl3_5_8b | internvl3_5_4b | gemma3_4b]
# Needs the weights under models/BACKBONE. Written by tools/make_paper_recipe.py.
# GPUS=8 takes more GPUs; a step keeps its 32 samples whatever their number, which must divide train.accumulation.
# CONFIG=recipes/fsdp2.yaml shares the frozen weights among smaller GPUs, MEMORY=40 says how many GB each has.
# Memory and hours of training are estimates for 4 GPUs of 80 GB and the largest pictures, of
#     strlora plan experiments/paper/internvl3_5_8b/METHOD.toml --gpus 4x80 --strategy ddp
# Hours of evaluation depend on the files; the plan that is printed before each run counts their questions.
# Finished runs are kept, interrupted ones resume. A method that fails is named at the end; the others go on.
set -euo pipefail
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$(dirname "$0")/.."
BACKBONE=${1:-internvl3_5_8b} GPUS=${GPUS:-4} MEMORY=${MEMORY:-80} CONFIG=${CONFIG:-recipes/ddp.yaml}
export PATH="$PWD/.venv/bin:$PATH"
launch=(accelerate launch --config_file "$CONFIG" --num_processes "$GPUS" -m strlora)
finished=() failed=()

is_finished() { grep -qs '"status": "finished"' "$1/run.json"; }

once() {  # METHOD: plan, then run, or resume what is there
    local spec=experiments/paper/$BACKBONE/$1.toml folder=results/paper/$BACKBONE/$1/seed42
    local words=(run "$spec" --out "$folder")
    if [ -e "$folder/run.json" ]; then words=(resume "$folder"); fi
    if strlora plan "$spec" --gpus "${GPUS}x$MEMORY" --strategy "$(basename "$CONFIG" .yaml)" &&
        { is_finished "$folder" || "${launch[@]}" "${words[@]}"; }
    then finished+=("$folder"); else failed+=("$1"); fi
}

# 33 GB a GPU, no training
once zero_shot
# 50 GB a GPU, 1575 steps, 1.9 h
once strlora
# 54 GB a GPU, 1575 steps, 2.0 h
once strlora_released
# 49 GB a GPU, 1575 steps, 1.9 h
once strlora_prototypes
# 48 GB a GPU, 1575 steps, 1.9 h
once lora
# 64 GB a GPU, 1575 steps, 2.0 h
once ewc
# 51 GB a GPU, 1575 steps, 2.6 h
once lwf
# 48 GB a GPU, 2079 steps, 2.5 h
once replay
# 49 GB a GPU, 1575 steps, 1.9 h
once olora
# 48 GB a GPU, 1575 steps, 1.9 h
once moelora
# 48 GB a GPU, 1575 steps, 1.9 h
once smolora
# 38 GB a GPU, 1575 steps, 1.9 h
once smolora_released
# 49 GB a GPU, 1575 steps, 1.9 h
once same
# 50 GB a GPU, 1575 steps, 1.9 h
once branchlora
# 48 GB a GPU, 1563 steps, 1.9 h
once joint

if [ ${#finished[@]} -gt 0 ]; then strlora report "${finished[@]}" || failed+=(report); fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "paper.sh: ${#failed[@]} failed: ${failed[*]}" >&2
    exit 1
fi
