"""Train a drafter for a target on its own responses.

coral-hf regenerate --prompts prompts.jsonl --output responses.jsonl
python examples/train_drafter.py --data responses.jsonl --output_dir outputs/drafter --max_steps 100
accelerate launch examples/train_drafter.py --data responses.jsonl --output_dir outputs/drafter   # several GPUs
"""

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from coral_hf import CoralDraftModel, demo
from coral_hf.hardware import native_bfloat16
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.data import read_rows
from coral_hf.training.trainer import CoralTrainer


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "Response files."})
    target: str = field(default="demo", metadata={"help": "Path or Hub id of the target, or 'demo'."})
    eval_rows: int = field(default=32, metadata={"help": "Rows held out for evaluation."})


if __name__ == "__main__":
    script, args = HfArgumentParser((ScriptArguments, CoralTrainingArguments)).parse_args_into_dataclasses()
    dtype = "bfloat16" if native_bfloat16() else "float32"
    if script.target == "demo":
        target, tokenizer = demo.load_target(dtype)
    else:
        target = AutoModelForCausalLM.from_pretrained(script.target, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(script.target)
    rows = read_rows(script.data)
    trainer = CoralTrainer(
        model=CoralDraftModel.from_target(target, tokenizer),
        target_model=target,
        args=args,
        train_dataset=rows[script.eval_rows :],
        eval_dataset=rows[: script.eval_rows],
        processing_class=tokenizer,
    )
    trainer.data_names = script.data  # for the record behind the drafter's card
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(metrics)
    trainer.save_model()
    trainer.accelerator.end_training()  # several processes leave together
