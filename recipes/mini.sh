#!/usr/bin/env bash
# The mini study from its beginning: learning rates and two variants on tuning seeds, then the main comparison, `make study`.
# JOBS=2 uses two cores, one thread a run. Finished runs are kept, interrupted ones resume. `make help` says how long the comparison takes;
# `strlora tune` searches every method alike, with more settings.
set -euo pipefail
cd "$(dirname "$0")/.."
JOBS=${JOBS:-1}
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

once() {  # FOLDER ARGUMENTS...: run, or resume what is there
    local folder=$1; shift
    if [ ! -e "$folder/run.json" ]; then strlora run "$@"
    elif ! grep -q '"status": "finished"' "$folder/run.json"; then strlora resume "$folder"; fi
}
export -f once
plain="--set stream.chunk_size=400 --set eval.every=5 --set routing_every=0"

{   # about an hour of one core: the same three rates for every method, on a seed that is reported nowhere
    for lr in 5e-4 1e-3 2e-3; do for method in lora strlora joint; do
        out=scratch/rates/$method-$lr-100
        echo "once $out --method $method --seed 100 --set lr=$lr --set lr_later=$lr $plain --out $out"
    done; done
    # LoRA once more below its best rate, and the two that are close on a second seed; the released preset once
    for run in lora-2.5e-4-100 lora-5e-4-101 lora-1e-3-101 strlora_released-1e-3-100; do
        method=${run%%-*} seed=${run##*-} lr=${run#*-} lr=${lr%-*} out=scratch/rates/$run
        echo "once $out --method $method --seed $seed --set lr=$lr --set lr_later=$lr $plain --out $out"
    done
    # how stage 1 is trained
    for seed in 100 101; do for stage1 in prior straight_through frozen; do
        [ $stage1-$seed = prior-100 ] && continue  # it is among the rates
        out=scratch/rates/stage1-$stage1-$seed
        echo "once $out --seed $seed --set stage1=$stage1 $plain --out $out"
    done; done
} | xargs -P "$JOBS" -I{} bash -c '{}'
strlora report scratch/rates/*/ --json > results/mini/rates.json

# the reporting seeds (results/mini/<stream>/<method>/seed<n>, from a clean commit)
make study ARGS="--jobs $JOBS"
