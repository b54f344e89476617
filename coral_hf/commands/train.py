"""`coral-hf train`: trains a drafter, or a part of its head."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import set_seed

from ..drafter.hub_names import hub_commit
from ..drafter.modeling_coral import CoralDraftModel
from ..training.recipe import drafter_settings, shortlist_size
from .loading import DrafterOptions, TargetOptions, load_drafter, resolve_dtype
from .making.after_training import tune_trained
from .outputs import check_output_folder, finished
from .rendering import FORMATS_HELP, DataOptions


@dataclass
class TrainCommand(TargetOptions, DrafterOptions, DataOptions):
    """Train a drafter on the target's own responses. Takes the flags of TrainingArguments as well.

    Examples:
        coral-hf train --target your/model --data responses.jsonl --output outputs/drafter
        coral-hf train --target your/model --data responses.jsonl --output outputs/drafter --estimate true
        coral-hf train --target your/model --data responses.jsonl --output outputs/drafter --resume-from-checkpoint last
    """

    REFUSED: ClassVar[dict[str, str]] = {
        "--device_map": "training puts the whole target on each process's device. --shard_target true splits a larger target over "
        "several processes. Choose another device with `accelerate launch` or CUDA_VISIBLE_DEVICES."
    }

    data: list[str] = field(
        metadata={
            "help": f"Prompts with answers: {FORMATS_HELP}; or a folder of shards, or one written by save_to_disk."
        }
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read --data during training instead of before it. Requires --max_steps. Rows are shuffled in buffers "
            "(--stream_buffer_size) and not grouped by length. Resuming reads the stream again up to the last step."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the frozen target; auto: bfloat16 if the hardware multiplies it natively."},
    )
    drafter: str | None = field(
        default=None, metadata={"help": "Continue training this drafter instead of a new one."}
    )
    shape: str | None = field(
        default=None,
        metadata={
            "help": "Shape of a new drafter: eagle or eagle3 (default: eagle3 over four of the target's features)."
        },
    )
    router_groups: int | None = field(
        default=None, metadata={"help": "With --stage router: give the drafter a new router of this many groups."}
    )
    router_grouping: str | None = field(
        default=None,
        metadata={"help": "With --router-groups: consecutive ids (default) or clustered rows of the head."},
    )
    low_rank_size: int | None = field(
        default=None,
        metadata={
            "help": "With --stage low_rank: give the drafter a new low-rank head of this rank, which starts as the truncated SVD of the "
            "target's head."
        },
    )
    low_rank_candidates: int | None = field(
        default=None,
        metadata={"help": "With --low-rank-size: best ids of the new head that are scored exactly (default: 64)."},
    )
    shortlist_size: int | None = field(
        default=None,
        metadata={
            "help": "Draft only the N most frequent ids in the responses (default for a new drafter: a sixth of the "
            "vocabulary, in thousands; 0: no shortlist)."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Settings of a new drafter as JSON, for example '{\"target_feature_layers\": [2, 15, -1]}'."
        },
    )
    eval_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows held out for evaluation: whole conversations, chosen by a hash of their ids (default: 64, at most a "
            "tenth of the rows; 0: none)."
        },
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "Response files to evaluate on, instead of eval_rows."}
    )
    check_overlap: list[str] = field(
        default_factory=list,
        metadata={"help": "Evaluation prompts: warn if training prompts are among them (as with --eval_data)."},
    )
    tune: bool = field(
        default=True,
        metadata={
            "help": "After training, measure on held-out conversations which draft size pays on this machine, and save it in the "
            "drafter's config."
        },
    )
    estimate: bool = field(
        default=False,
        metadata={
            "help": "Print parameters, peak memory, disk and tokens per second, measured on two real steps, and stop."
        },
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self, args) -> int:
        from ..data.held_out import told
        from ..data.overlap import warn_of_overlap
        from ..training.low_rank_trainer import CoralLowRankTrainer
        from ..training.router_trainer import CoralRouterTrainer
        from ..training.run.placement import check_devices
        from ..training.run.run_folder import check_run_folder
        from ..training.trainer import CoralTrainer

        check_output_folder(args.output_dir, "output_dir")
        if not self.estimate:
            check_run_folder(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
        check_devices(args)
        trainer_class = {"router": CoralRouterTrainer, "low_rank": CoralLowRankTrainer}.get(args.stage, CoralTrainer)
        head_stage = args.stage != "drafter"
        if head_stage and self.drafter is None:
            raise ValueError(
                f"--stage {args.stage} trains a part of the head of a trained drafter: name it with --drafter."
            )
        if self.drafter is None and self.drafter_revision is not None:
            raise ValueError(
                f"--drafter_revision {self.drafter_revision} requires --drafter (the drafter to continue training)."
            )
        if self.router_groups is not None and args.stage != "router":
            raise ValueError(f"--router_groups {self.router_groups} adds a router: train it with --stage router.")
        if self.router_grouping is not None and self.router_groups is None:
            raise ValueError(f"--router_grouping {self.router_grouping} requires --router_groups.")
        if self.low_rank_size is not None and args.stage != "low_rank":
            raise ValueError(
                f"--low_rank_size {self.low_rank_size} adds a low-rank head: train it with --stage low_rank."
            )
        if self.low_rank_candidates is not None and self.low_rank_size is None:
            raise ValueError(f"--low_rank_candidates {self.low_rank_candidates} requires --low_rank_size.")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.streaming and (self.estimate or self.shortlist_size):
            name = "--estimate" if self.estimate else f"--shortlist_size {self.shortlist_size}"
            raise ValueError(f"{name} reads all rows first: leave out --streaming.")
        self._check_new_drafter()
        rows, eval_rows = self._read(tell=args.process_index == 0)
        if not self.eval_data and self.eval_rows != 0 and args.process_index == 0:
            print(told(rows, eval_rows), flush=True)
        # the trainer places the target on each rank's device
        target, tokenizer = self.load_target(resolve_dtype(self.dtype, args.device), "cpu")
        if (files := [*self.eval_data, *self.check_overlap]) and args.process_index == 0:
            warn_of_overlap(rows, files, tokenizer)
        set_seed(args.seed)  # `Trainer` sets the seed after new weights are drawn
        if self.drafter is not None:
            drafter = load_drafter(self.drafter, self.drafter_revision)
            commit = hub_commit(target.config)
            if commit is not None:  # a target from the Hub: the drafter is now trained for this commit
                drafter.config.target_name_or_path = target.config._name_or_path
                drafter.config.target_revision = commit
        else:
            drafter = CoralDraftModel.from_target(target, tokenizer, **self._settings(target.config))
        if self.router_groups is not None:
            drafter.add_router(self.router_groups, grouping=self.router_grouping or "consecutive")
        if self.low_rank_size is not None:
            drafter.add_low_rank_head(target, self.low_rank_size, self.low_rank_candidates)
        if self.estimate:
            return _print_estimate(trainer_class, drafter, target, args, rows, tokenizer)
        trainer = trainer_class(
            model=drafter,
            target_model=target,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            processing_class=tokenizer,
        )
        trainer.data_names = self.data
        if size := self._shortlist_size(trainer):
            drafter.add_shortlist(trainer.train_dataset.response_counts(drafter.config.vocab_size), size)
        if self.router_groups is not None:
            trainer.start_router()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        metrics = trainer.evaluate() if eval_rows else {}
        trainer.save_model()
        trainer.save_state()
        if self.tune and not head_stage:
            tune_trained(trainer)
        if trainer.is_world_process_zero():
            print(json.dumps(metrics))
            check = f"coral-hf verify --target {self.target} --drafter {args.output_dir} --data PROMPTS"
            finished(args.output_dir, then=check)
        trainer.end_training()  # all processes exit together
        return 0

    def after_interrupt(self, args) -> str:
        """How to resume after Ctrl-C."""
        from ..training.run.run_folder import last_checkpoint, last_of_run

        if last_of_run(args.output_dir) is None:
            return f"{last_checkpoint(Path(args.output_dir))}, so the same command starts from the beginning"
        return (
            f"{last_checkpoint(Path(args.output_dir))}; resume with the same command and --resume-from-checkpoint last"
        )

    def _read(self, tell: bool) -> tuple[Any, list[dict[str, Any]]]:
        """Rows to train on and to evaluate on."""
        from ..data.dataset import read_rows
        from ..data.held_out import hold_out
        from ..data.sources import RowStream

        if self.eval_rows is not None and self.eval_rows < 0:
            raise ValueError(f"--eval_rows {self.eval_rows} must be 0 or more.")
        rows: Any = (RowStream if self.streaming else read_rows)(self.data, **self.reading, tell=tell)
        if self.eval_data:
            return rows, read_rows(self.eval_data, **self.reading, tell=tell)
        return hold_out(rows, self.eval_rows)

    def _shortlist_size(self, trainer: Any) -> int:
        """Size of the shortlist that the drafter gets before training; 0: none."""
        if self.shortlist_size is not None:
            return self.shortlist_size
        config = trainer.model.config
        new = self.drafter is None and not self.streaming and config.draft_vocab_size is None
        return shortlist_size(config.vocab_size) if new and trainer.adapter.has_rows else 0

    def _check_new_drafter(self) -> None:
        """Rejects wrong settings of a new drafter that can be detected before the target is loaded."""
        if self.drafter is not None:
            for name in ("shape", "config_overrides"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"--{name} {value} is for a new drafter; --drafter {self.drafter} has its own.")
        if self.shape not in (None, "eagle", "eagle3"):
            raise ValueError(f"--shape {self.shape!r} is unknown; choose eagle or eagle3.")
        self._overrides()

    def _overrides(self) -> dict[str, Any]:
        """`--config_overrides` and `--shape` as settings."""
        try:
            overrides = json.loads(self.config_overrides or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--config_overrides {self.config_overrides!r} is not JSON: {error}.") from error
        if not isinstance(overrides, dict):
            raise ValueError(f"--config_overrides {self.config_overrides!r} must be a JSON object of settings.")
        return overrides if self.shape is None else {**overrides, "shape": self.shape}

    def _settings(self, target_config: Any) -> dict[str, Any]:
        """Settings of a new drafter: the given ones, completed by the recipe."""
        overrides = self._overrides()
        best = drafter_settings(target_config)
        return {**best, **overrides} if overrides.get("shape", best["shape"]) == best["shape"] else overrides


def _print_estimate(trainer_class: type, drafter: Any, target: Any, args: Any, rows: Any, tokenizer: Any) -> int:
    from ..training.report.estimate import measure_training, without_traces

    steps = args.max_steps
    with tempfile.TemporaryDirectory() as folder:
        without_traces(args, folder)
        trainer = trainer_class(drafter, target, args, train_dataset=rows, processing_class=tokenizer)
        epochs = args.num_train_epochs
        if steps > 0:
            epochs = steps * trainer._global_batch() / len(trainer.train_dataset)
        estimate = measure_training(trainer, epochs)
        if trainer.is_world_process_zero():
            print("\n".join(estimate.lines()))
    return 0
