"""Train a drafter for a target on its own responses.

coral-hf regenerate --prompts prompts.jsonl --output responses.jsonl
python examples/train_drafter.py --data responses.jsonl --output outputs/drafter --max_steps 100
accelerate launch examples/train_drafter.py --data responses.jsonl --output outputs/drafter   # several GPUs
"""

from dataclasses import dataclass, field

from transformers import set_seed

from coral_hf import CoralDraftModel
from coral_hf.commands.loading import TargetOptions, resolve_dtype
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.dataset import read_rows
from coral_hf.data.held_out import hold_out
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.recipe import drafter_settings
from coral_hf.training.trainer import CoralTrainer


@dataclass
class ScriptArguments(TargetOptions):
    data: list[str] = field(metadata={"help": "Response files."})
    eval_rows: int | None = field(
        default=None, metadata={"help": "Rows held out for evaluation (default: 64, at most a tenth)."}
    )


def main() -> None:
    script, args = parse_script(ScriptArguments, CoralTrainingArguments)
    check_output_folder(args.output_dir, "output_dir")
    # on the CPU: the trainer moves it to each process's device
    target, tokenizer = script.load_target(resolve_dtype("auto", args.device), "cpu")
    rows, held_out = hold_out(read_rows(script.data), script.eval_rows)
    set_seed(args.seed)  # the trainer sets the seed after the new drafter's weights are drawn
    trainer = CoralTrainer(
        model=CoralDraftModel.from_target(target, tokenizer, **drafter_settings(target.config)),
        target_model=target,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
    )
    trainer.data_names = script.data  # for the record that the drafter's card uses
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate() if held_out else {}
    if trainer.is_world_process_zero():
        print(metrics)
    trainer.save_model()
    trainer.end_training()  # all processes exit together


if __name__ == "__main__":
    run_script(main)
