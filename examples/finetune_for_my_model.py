"""Adapt a drafter to a fine-tuned copy of its target with LoRA: minutes instead of a new training.

coral-hf regenerate --target my/fine-tune --prompts prompts.jsonl --output responses.jsonl
python examples/finetune_for_my_model.py --target my/fine-tune --data responses.jsonl --output_dir outputs/adapted
"""

from dataclasses import dataclass, field

from peft import LoraConfig

from coral_hf import CoralDraftModel, demo
from coral_hf.commands.loading import TargetOptions, resolve_dtype
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.training import CoralTrainer, CoralTrainingArguments, hold_out, read_rows


@dataclass
class ScriptArguments(TargetOptions):
    data: list[str] = field(metadata={"help": "Responses of the fine-tuned target."})
    drafter: str = field(default="demo", metadata={"help": "Drafter of the original target, or 'demo'."})
    eval_rows: int | None = field(
        default=None, metadata={"help": "Rows held out for evaluation (default: 64, at most a tenth)."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})


def main() -> None:
    script, args = parse_script(ScriptArguments, CoralTrainingArguments)
    check_output_folder(args.output_dir, "output_dir")
    # on the CPU: the trainer moves it to each process's device
    target, tokenizer = script.load_target(resolve_dtype("auto", args.device), "cpu")
    folder = demo.drafter_path() if script.drafter == "demo" else script.drafter
    rows, held_out = hold_out(read_rows(script.data), script.eval_rows)
    if not held_out:
        raise SystemExit(f"{len(rows)} rows are too few to hold some out by default: say how many with --eval_rows.")
    trainer = CoralTrainer(
        model=CoralDraftModel.from_pretrained(folder, dtype="float32"),
        target_model=target,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        # all linear layers except the router's, which is trained later with --stage router
        peft_config=LoraConfig(r=script.rank, lora_alpha=2 * script.rank),
    )
    before = trainer.evaluate()["eval_acceptance_length"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()["eval_acceptance_length"]
    trainer.save_model()  # the merged drafter, and the adapters in adapter/
    print(f"held-out acceptance length {before:.2f} -> {after:.2f}; the drafter is in {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
