#!/usr/bin/env bash
# A CORAL drafter for one of the paper's targets (CORAL section 4), or one of their size: drafter, then LM-head router.
# Needs GPUs that hold the target in bf16 (16 GB) beside the drafter; more than one share the work through Accelerate.
# The paper gives no code. Settings that are not named here follow the target (docs/training.md, "Settings"): the learning
# rates are EAGLE's and HASS's for this width, the rest is ours, measured on a small model only. `--preset coral` trains the
# paper's own method. Shapes are tested, the training itself has not been run.
# usage: bash examples/recipes/paper_target.sh TARGET prompts.jsonl eval_prompts.jsonl OUTPUT_DIR
#   TARGET: meta-llama/Llama-2-7b-chat-hf, meta-llama/Meta-Llama-3-8B-Instruct or Qwen/Qwen2.5-7B-Instruct
#   eval_prompts.jsonl: prompts to measure on, never trained on (MT-bench, HumanEval and GSM8K are the paper's)
set -euo pipefail
target=$1
prompts=$2
eval_prompts=$3
output=$4

coral-hf regenerate --target "$target" --prompts "$prompts" --output "$output/responses.jsonl" --max-new-tokens 1024

accelerate launch -m coral_hf.cli train --target "$target" --data "$output/responses.jsonl" \
    --check-overlap "$eval_prompts" --output "$output/drafter" --save-steps 500 --report-to none

accelerate launch -m coral_hf.cli train --target "$target" --data "$output/responses.jsonl" \
    --drafter "$output/drafter" --output "$output/routed" --stage router --router-groups 64 --report-to none

coral-hf benchmark --target "$target" --drafter "$output/routed" --data "$eval_prompts" \
    --limit 20 --output "$output/routed/training" --method coral full:draft_head=full

coral-hf card "$output/routed"
