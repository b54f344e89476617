# How the drafter was trained, on two CPU cores, stage after stage (each goes on from the last checkpoint of the one
# before, stopped by hand where max_steps is 4000). Stage 1 saw 4,094 of the 6,104 first responses, stages 2 and 3 all
# of them, stage 4 also the 1,118 made later. `first.jsonl` and `all/` stand for those rows of ../responses.
common="--target demo --cache-features features --per_device_train_batch_size 8 --eval_rows 32 --report_to none"
constant="--rollout-schedule 1 --csra-weight 0 --lr_scheduler_type constant_with_warmup --max_steps 4000"

coral-hf train $common $constant --data first.jsonl --output_dir s1 --shape eagle --threads 1 \
    --learning_rate 2e-3 --warmup_steps 30 --loss_vocab_size 8192 --loss_negatives 0
coral-hf train $common $constant --data first.jsonl --output_dir s2 --drafter s1/last --threads 1 \
    --learning_rate 1.5e-3 --warmup_steps 20 --loss_vocab_size 6144 --loss_negatives 4096
coral-hf train $common $constant --data first.jsonl --output_dir s3 --drafter s2/last --threads 1 --seed 7 \
    --learning_rate 1e-3 --warmup_steps 20 --loss_vocab_size 8192 --loss_negatives 4096 \
    --feature_noise 0.4 --weight_decay 0.1
coral-hf train $common --preset coral --rollout-schedule 3 --data all --output_dir s4 --drafter s3/last --threads 2 \
    --seed 11 --learning_rate 1e-3 --lr_scheduler_type linear --warmup_steps 10 --max_steps 300 \
    --loss_vocab_size 8192 --loss_negatives 4096 --feature_noise 0.2 --weight_decay 0.1

# Afterwards, without training: the frequency shortlist that drafting is limited to, and the default draft size.
python - <<'SHORTLIST'
from coral_hf import CoralDraftModel
from coral_hf.training.data import ConversationDataset, read_rows

drafter = CoralDraftModel.from_pretrained("s4", dtype="bfloat16")
counts = ConversationDataset(read_rows(["all"]), None, 2048).response_counts(drafter.config.vocab_size)
drafter.add_shortlist(counts, 4096)
drafter.config.draft_depth, drafter.config.draft_top_k, drafter.config.draft_total_tokens = 2, 2, 4
drafter.save_pretrained("final")
SHORTLIST
