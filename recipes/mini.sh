#!/usr/bin/env bash
# The mini study: learning rates on a tuning seed, then three reporting seeds of every method on both streams.
# A run takes 3 to 6 minutes on one core, one thread each; JOBS=2 uses two cores. Finished runs are kept, interrupted ones resume.
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

{   # about an hour of one core: the same three rates for every method, on a seed that is reported nowhere
    for lr in 5e-4 1e-3 2e-3; do for method in lora strlora strlora_released joint; do
        out=scratch/rates/$method-$lr
        echo "once $out --method $method --seed 100 --set lr=$lr --set lr_later=$lr --set stream.chunk_size=400" \
             "--set eval.every=5 --set routing_every=0 --out $out"
    done; done
    # about two hours of one core: the reporting seeds (results/mini/<stream>/<method>/seed<n>, from a clean commit)
    for stream in windows strcvit; do for seed in 0 1 2; do for method in lora joint strlora zero_shot strlora_released; do
        echo "once results/mini/$stream/$method/seed$seed experiments/mini/$stream/$method.toml --seed $seed"
    done; done; done
} | xargs -P "$JOBS" -I{} bash -c '{}'
