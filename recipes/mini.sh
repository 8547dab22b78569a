#!/usr/bin/env bash
# The mini study: learning rates on a tuning seed, then three reporting seeds of every method.
# One run takes 4 to 6 minutes on one core; give JOBS=2 on two cores. Finished runs are kept, interrupted ones resume.
set -euo pipefail
cd "$(dirname "$0")/.."
JOBS=${JOBS:-1}
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

once() {  # FOLDER ARGUMENTS...: run, or resume what is there
    local folder=$1; shift
    if [ ! -e "$folder/run.json" ]; then strlora run "$@" --threads 1
    elif ! grep -q '"status": "finished"' "$folder/run.json"; then strlora resume "$folder"; fi
}
export -f once

{   # about half an hour: which of two rates, the same two for every method (results/mini/rates.csv)
    for lr in 1e-3 2e-3; do for method in lora strlora joint; do
        out=scratch/rates/$method-$lr
        echo "once $out --method $method --seed 100 --set lr=$lr --set lr_later=$lr --set eval.every=5 --set routing_every=0 --out $out"
    done; done
    # about two hours: the reporting seeds (results/mini/<stream>/<method>/seed<n>, from a clean commit)
    for stream in windows strcvit; do for seed in 0 1 2; do for method in lora joint strlora zero_shot strlora_released; do
        echo "once results/mini/$stream/$method/seed$seed experiments/mini/$stream/$method.toml --seed $seed"
    done; done; done
} | xargs -P "$JOBS" -I{} bash -c '{}'
