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
# dev_responses.jsonl: the target's greedy answers to 80 development prompts, 128 tokens each; never trained on.
# Afterwards: weights cast to bfloat16, draft_depth, draft_top_k and draft_total_tokens set in config.json, and
# drafter.add_shortlist(counts over all of responses/, 8192).
