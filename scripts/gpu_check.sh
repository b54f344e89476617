#!/usr/bin/env bash
# All measurements for ten minutes on a GPU, as JSON files in a folder. Existing files are not measured again: run it until it
# reports that nothing is left. On a machine without a GPU, --small tries it in minutes.
# usage: scripts/gpu_check.sh [FOLDER] [--small]
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-outputs/gpu_check}
small=${2:-}
python=${PYTHON:-python}
minutes=${MINUTES:-4}  # for the cells of each model
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
mkdir -p "$folder"
failed=()

# part NAME COMMAND...: runs the command unless NAME.json exists
part() {
    local name=$1
    shift
    [ -e "$folder/$name.json" ] && { echo "$name: exists"; return; }
    echo "$name: $*"
    "$@" || failed+=("$name")
}

check=("$python" benchmarks/gpu_check.py --output "$folder")
if [ "$small" = --small ]; then
    steps=(--small true --context 16 --max_new_tokens 12)
    training=(--vocab_size 512 --hidden_size 64 --batch 1 --length 96 --memory_length 0 --repeats 1)
else
    steps=(--minutes "$minutes")
    training=(--vocab_size 128256 --hidden_size 4096 --batch 4 --length 2048 --memory_length 2048)
    part operations "$python" benchmarks/count_operations.py --device cuda --json "$folder/operations.json"
    part benchmark "$python" -m coral_hf.cli benchmark --quick true --method plain_compiled coral \
        compiled:draft_compile=true,draft_depth=4,draft_top_k=4,draft_total_tokens=16 --output "$folder"
fi
part steps_llama-3-8b "${check[@]}" --part steps --model llama-3-8b "${steps[@]}"
part tests "${check[@]}" --part tests
part training "$python" benchmarks/benchmark_training.py --steps 3 --reference none "${training[@]}" --json "$folder/training.json"
if [ "$small" != --small ]; then
    part steps_demo "${check[@]}" --part steps --model demo "${steps[@]}"
    part training_demo "$python" benchmarks/benchmark_training.py --steps 3 --reference none --json "$folder/training_demo.json"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu_check: failed: ${failed[*]}" >&2
    exit 1
fi
echo "gpu_check: $(find "$folder" -name '*.json' | wc -l) files in $folder"
