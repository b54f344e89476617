# How the drafter was trained, on one NVIDIA H100 in 172 and 267 seconds, while the same GPU wrote the answers that stage
# 2 then trained on. The two stages ran until a time of the clock instead of a step (rates and K follow the time passed);
# max_steps and the schedules below are the steps that were reached. Only finite updates were applied (none was skipped),
# and cuDNN's attention was switched off after one earlier trial with it ended in NaN.
model_card=model_cards/smollm2-135m-instruct-coral

# The answers, greedy: responses-0000{0,1,2} were made earlier on a CPU; stage 2 saw 8,067 of the 9,710 of responses-00003.
coral-hf regenerate --target demo --prompts prompts.jsonl --output greedy.jsonl --max_new_tokens 256 \
    --max_prompt_tokens 640 --slots 384 --exclude $model_card/responses/*.parquet --shards $model_card/responses

common="--target demo --per_device_train_batch_size 64 --loss_chunk_size 4096 --max_length 1024 --warmup_steps 30
    --learning_rate 2e-3 --weight_decay 0.05 --eval_data dev_responses.jsonl --eval_strategy steps --report_to none"
coral-hf train $common --data $model_card/responses/responses-0000[012].parquet --output_dir stage1 --shape eagle3 \
    --config_overrides '{"target_feature_layers": [3, 15, 26, -1], "num_key_value_heads": 9, "intermediate_size": 2048}' \
    --rollout_schedule 1 --csra_weight 0 --lr_scheduler_type constant_with_warmup --feature_noise 0.1 --max_steps 448
coral-hf train $common --data $model_card/responses --output_dir stage2 --drafter stage1 \
    --rollout_schedule 1:0.37,3:0.63 --csra_weight 0.05 --lr_scheduler_type linear --feature_noise 0.05 --max_steps 1684
# Stage 3, on one core of a CPU in 42 minutes: 459 of the 468 answers of responses-00004, and
# 560 of the older ones, with at most 520 tokens.
coral-hf train --target demo --drafter stage2 --data stage3.jsonl --eval_data dev_responses_40.jsonl --output_dir stage3 \
    --rollout_schedule 3 --csra_weight 0.05 --feature_noise 0.1 --weight_decay 0.05 --learning_rate 2e-4 --warmup_steps 10 \
    --lr_scheduler_type linear --per_device_train_batch_size 4 --max_length 900 --num_train_epochs 1 --dtype float32 \
    --loss_vocab_size 8192 --loss_negatives 2048 --loss_chunk_size 128 --max_grad_norm 0.5

# Stage 4, on two cores of a CPU with native bf16. Its fc, which read layers 3, 15, 26 and the normed last state, was fitted to
# the inputs of layers 3, 15, 26 and 29 instead, which serving engines capture: by least squares, here on the response
# tokens of 437 answers of responses-00006 (the script, which fits on whole conversations, gives the same within 0.003 of tau).
python benchmarks/refit_features.py --drafter stage3 --layers 3 15 26 29 --data $model_card/responses --output refitted --rows 1000
common="--target demo --rollout_schedule 3 --csra_weight 0.05 --weight_decay 0.05 --lr_scheduler_type linear --max_length 900
    --num_train_epochs 1 --dtype bfloat16 --bf16 true --loss_vocab_size 8192 --loss_negatives 2048 --max_grad_norm 0.5
    --eval_data dev_responses.jsonl --threads 2 --report_to none"
# the first 560 answers of responses-00006, then 4,600 of all answers drawn at random (with the late ones: 00004 to 00006)
coral-hf train $common --drafter refitted --data stage4a.jsonl --output_dir stage4a --feature_noise 0.1 --learning_rate 3e-4 \
    --warmup_steps 10 --per_device_train_batch_size 8
# average: the mean of refitted's and stage4a's weights
coral-hf train $common --drafter average --data stage4b.jsonl --output_dir stage4b --feature_noise 0.05 --learning_rate 4e-4 \
    --warmup_steps 20 --per_device_train_batch_size 16 --regression_loss_weight 0.1
# Shipped: the mean of average's and stage4b's weights. Each training alone ended where it had begun (tau of simulated chains on
# dev_responses.jsonl: refitted 2.33, stage4a 2.32, average 2.34, stage4b 2.34, the mean of both 2.35).

# dev_responses.jsonl: the target's greedy answers to 80 development prompts, 128 tokens each; never trained on.
# dev_responses_40.jsonl: those to the first 10 prompts of MT-bench, HumanEval, GSM8K and CNN/DM, in float32; what stage 3's
# lines in log.jsonl are measured on. They therefore do not continue those of stage 2, nor do those of stage 4 continue them.
# Afterwards: weights cast to bfloat16; draft_depth, draft_top_k, draft_total_tokens, draft_cost_aware and the calibration of
# `coral-hf tune` (prompts 25 to 28 of MT-bench, HumanEval and GSM8K; of its cost-aware sizes, which predict alike within 2 %, one
# that comes through on both kinds of CPU) set in config.json; and before stage 3
# drafter.add_shortlist(counts over all of responses/, 8192).
