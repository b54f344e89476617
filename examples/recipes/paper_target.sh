#!/usr/bin/env bash
# A CORAL drafter for one of the paper's targets (CORAL section 4), or one of their size: drafter, then LM-head router.
# Needs GPUs that hold the target in bf16 (16 GB) beside the drafter; more than one share the work through Accelerate.
# The paper gives no code: K=3, betas, clipping and bf16 are HASS's; learning rate, loss weights, CSRA's weight and the
# router's sizes are ours, measured on a small model only. Shapes are tested, the training itself has not been run.
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
    --check_overlap "$eval_prompts" --output_dir "$output/drafter" --preset coral --rollout-schedule 1:0.6,3:0.4 \
    --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 100 --num_train_epochs 10 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_length 2048 --adam_beta2 0.95 \
    --max_grad_norm 0.5 --save_steps 500 --report_to none

accelerate launch -m coral_hf.cli train --target "$target" --data "$output/responses.jsonl" \
    --drafter "$output/drafter" --output_dir "$output/routed" --stage router --router-groups 64 --rollout-schedule 3 \
    --learning_rate 1e-3 --lr_scheduler_type cosine --num_train_epochs 1 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_length 2048 --report_to none

coral-hf benchmark --target "$target" --drafter "$output/routed" --data "$eval_prompts" \
    --limit 20 --output "$output/routed/training" --method coral full:draft_head=full

coral-hf card "$output/routed"
