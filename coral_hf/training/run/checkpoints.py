"""Checkpoints that survive an interruption: written to a temporary folder, renamed, and checked before resuming."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ...drafter.hub_names import hub_commit
from ...drafter.weight_files import WEIGHTS_FILE, follow_umask
from ...utils.jsonl import read_json
from ..losses.terms import TERMS
from .adapters import is_peft
from .run_folder import PROGRESS_FILE, RunFolder, check_run_folder, last_checkpoint


logger = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
PARTIAL_FOLDER = "checkpoint-being-written"  # never mistaken for a checkpoint, whose names end in a number
_FINGERPRINT_ROWS = 64
# settings that determine the order of rows, and settings that determine the losses
_ORDER = ("seed", "train_sampling_strategy", "stream_buffer_size", "packing", "max_length")
_RECIPE: tuple[str, ...] = (
    "rollout_schedule",
    "step_decay",
    *(name for term in TERMS for name in (term.weight, *term.settings)),
    "feature_noise",
    "loss_vocab_size",
    "loss_negatives",
)
# in the plain RuntimeErrors that `torch.save` raises for a failed write
_TORCH_WRITING = ("PytorchStreamWriter", "inline_container", "iostream")


class CheckpointMixin(Trainer):
    """Saves and resumes exactly. Must precede [`~transformers.Trainer`] in the bases.

    All random numbers of a step (CSRA's positions, sampled negatives, feature noise) come from the default generators, whose
    states `Trainer` stores. The order of rows depends only on seed and epoch.
    """

    _staging: Path | None = None
    _folder: RunFolder | None = None  # set by the last call of `train`
    _tokens: Any  # CountTokens
    _train_batch_size: int
    tokens_seen: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]; `resume_from_checkpoint` may also be `"true"` or `"last"`.

        Raises:
            ValueError: if the checkpoint is incomplete, or belongs to another drafter, target, stage, data, order of rows or
                batch size; or if `output_dir` contains a run that is neither resumed nor replaced (`overwrite_output_dir`).
            OSError: if a checkpoint cannot be written.
        """
        output = Path(self.args.output_dir)
        folder = check_run_folder(output, resume_from_checkpoint, self.args.overwrite_output_dir)
        if folder is None and resume_from_checkpoint and self.args.process_index == 0:
            print(f"{output} contains no checkpoint to resume from: training starts from the beginning.")
        self._tokens.start = self.tokens_seen
        if folder is not None:
            self.check_checkpoint(folder)
            progress = folder / PROGRESS_FILE
            if progress.exists():
                self._tokens.start = read_json(progress)["response_tokens"]
        self._folder = RunFolder(output, folder)
        if self.args.should_save and output.is_dir():
            shutil.rmtree(output / PARTIAL_FOLDER, ignore_errors=True)  # left by an interrupted run
            if self.args.save_strategy != "no":
                self._check_space(output)
        return super().train(None if folder is None else str(folder), *args, **kwargs)

    # Writing ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # only from its final folder
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging, final = run / PARTIAL_FOLDER, run / name
        if self.args.should_save:
            self._check_space(run)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._finish_staged(staging, name, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, RuntimeError) and not any(part in str(error) for part in _TORCH_WRITING):
                raise
            raise OSError(
                f"{final} could not be written ({str(error).splitlines()[0]}); {last_checkpoint(run)}. Free or change the disk "
                "(--output_dir), then continue with --resume_from_checkpoint last."
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if final.exists():  # from an earlier run that is replaced, or resumed from an older checkpoint
                os.replace(final, staging / "old")
            os.replace(staging / name, final)
            shutil.rmtree(staging)
            self._run_folder(run).claim(run, name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            self._run_folder(run).rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _finish_staged(self, staging: Path, name: str, final: Path) -> None:
        progress = {**self._progress(), "run": self._run_folder(staging.parent).run}
        (staging / name / PROGRESS_FILE).write_text(json.dumps(progress))
        follow_umask(staging / name)  # adapters are not saved by the drafter
        # `Trainer` records the temporary folder as the best checkpoint
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staging / name / STATE_FILE))

    def _run_folder(self, output: Path) -> RunFolder:
        if self._folder is None:  # saved without a call of `train`
            self._folder = RunFolder(output, None)
        return self._folder

    def _check_space(self, folder: Path) -> None:
        """Raises `OSError` unless another checkpoint fits on the disk."""
        needed = checkpoint_bytes(self.model, self.args.save_only_model)
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise OSError(
                f"{folder} has {free / 2**20:,.0f} MiB free; a checkpoint needs {needed / 2**20:,.0f} MiB; "
                f"{last_checkpoint(folder)}. Free or change the disk (--output_dir), or lower --save_total_limit."
            )

    # Resuming --------------------------------------------------------------------------------------------------

    def _progress(self) -> dict[str, Any]:
        args, data = self.args, self.train_dataset
        streamed = data is not None and not has_length(data)
        return {
            "response_tokens": self.tokens_seen,
            "stage": args.stage,
            "data": fingerprint(data),
            "seed": args.seed if args.data_seed is None else args.data_seed,  # of the order of rows
            "train_sampling_strategy": None if streamed else args.train_sampling_strategy,
            "stream_buffer_size": args.stream_buffer_size if streamed else None,
            "packing": args.packing,
            "max_length": args.max_length,
            "recipe": {name: getattr(args, name) for name in _RECIPE},
            "batch": self._global_batch(),
            # only the last part, because the same target may be in another folder
            "target": Path(name).name if (name := self.model.config.target_name_or_path) else None,
            "target_revision": self.target_revision,
            # as text, to distinguish no template variables from unknown ones
            "chat_template_kwargs": None
            if (mode := self.model.config.chat_template_kwargs) is None
            else json.dumps(mode),
            "vocabulary": self.model.config.target_vocab_hash,
        }

    @property
    def target_revision(self) -> str | None:
        """The target's own commit if it is from the Hub. A continued drafter may name the commit of its first training."""
        return hub_commit(self.adapter.target.config) or self.model.config.target_revision

    def _global_batch(self) -> int:
        """Conversations per optimizer step, over all processes."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def check_checkpoint(self, folder: str | Path) -> None:
        """Raises `ValueError` unless a training of this drafter on this data can resume from `folder` exactly.

        A different schedule or different loss weights only cause a log message.
        """
        folder = Path(folder)
        again = "To start a new training from its weights, give that folder as the drafter (--drafter) instead."
        try:
            state = read_json(folder / STATE_FILE)
        except ValueError as error:
            raise ValueError(
                f"{folder} contains no readable {STATE_FILE}: it is not a checkpoint of a training. {again}"
            ) from error
        if self.args.auto_find_batch_size:  # `Trainer` starts with the batch size that was found
            self._train_batch_size = state.get("train_batch_size") or self._train_batch_size
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        weights = ADAPTER_FILE if is_peft(self.model) else WEIGHTS_FILE
        for name in (weights, "optimizer.pt", "scheduler.pt"):
            if not sharded and not (folder / name).is_file():
                raise ValueError(f"{folder} contains no {name}, which this training needs to resume. {again}")
        if not sharded and weights == WEIGHTS_FILE:
            expected = {key: list(value.shape) for key, value in self.model.state_dict().items()}
            found = _shapes(folder / WEIGHTS_FILE)
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            if wrong:
                key = wrong[0]
                raise ValueError(
                    f"{folder} is a checkpoint of another drafter: {key} has shape {found.get(key)} there and "
                    f"{expected.get(key)} here ({len(wrong)} tensors differ). Resume with the settings it was trained with."
                )
        path = folder / PROGRESS_FILE
        stored = read_json(path) if path.is_file() else {}
        progress = self._progress()
        recipe = progress.pop("recipe")
        for name, value in progress.items():
            if name == "response_tokens" or (name in ("data", *_ORDER) and self.args.ignore_data_skip):
                continue
            if stored.get(name) is not None and value is not None and stored[name] != value:
                if name == "target_revision":
                    again = f"Resume with the earlier target (--target_revision {stored[name]}). {again}"
                if name in _ORDER:
                    again = f"Continue with {name}={stored[name]}, or read the rows again with ignore_data_skip=True. {again}"
                raise ValueError(
                    f"{folder} was written by a training with another {name} ({stored[name]!r}, here {value!r}), so it cannot be "
                    f"resumed exactly. {again}"
                )
        self._warn_of_recipe(folder, stored.get("recipe") or {}, recipe)

    def _warn_of_recipe(self, folder: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
        """Logs changed losses, which may be intended."""
        changed = [
            f"{name}={here[name]!r} ({stored[name]!r} until now)"
            for name in stored.keys() & here.keys()
            if stored[name] != here[name]
        ]
        if changed and self.args.process_index == 0:
            logger.warning("The training of %s continues with other losses: %s.", folder, ", ".join(sorted(changed)))

    # The order of rows -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or dataset is None or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self, dataset)


class LengthGroupedSampler(torch.utils.data.Sampler):
    """A sampler that groups rows of similar length, in an order that depends only on seed and epoch.

    `Trainer`'s own sampler uses the global generator. Its state differs after resuming in the middle of an epoch, and
    between processes.

    Args:
        trainer ([`~transformers.Trainer`]): the source of seed, epoch and global batch size.
        dataset: rows with `input_ids`.
    """

    def __init__(self, trainer: Any, dataset: Any):
        self.trainer = trainer
        self.lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        # from the state, because a loader that skips batches does not forward `set_epoch`
        epoch = int(self.trainer.state.epoch or 0)
        args = self.trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        generator = torch.Generator().manual_seed(seed + epoch)
        return iter(get_length_grouped_indices(self.lengths, self.trainer._global_batch(), generator=generator))


def fingerprint(dataset: Any) -> str | None:
    """A hash of a data set's size and a sample of its rows, or of a stream's first rows."""
    if dataset is None:
        return None
    if has_length(dataset):
        count = len(dataset)
        size, items = str(count), (dataset[index] for index in range(0, count, max(1, count // _FINGERPRINT_ROWS)))
    else:
        size, items = "stream", dataset.head
    digest = hashlib.sha1(size.encode())
    for item in items:
        ids = torch.as_tensor(item["input_ids"], dtype=torch.int64)
        digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


def checkpoint_bytes(model: nn.Module, weights_only: bool = False) -> int:
    """Size of a checkpoint: all weights and, unless only the model is saved, AdamW's two moments of trained weights."""
    size = 0
    for parameter in model.parameters():
        copies = 3 if parameter.requires_grad and not weights_only else 1
        size += parameter.numel() * parameter.element_size() * copies
    return size + (1 << 16)


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as stored:
            return {key: list(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); resume from an older checkpoint.") from error


__all__ = [
    "CheckpointMixin",
    "LengthGroupedSampler",
    "checkpoint_bytes",
    "fingerprint",
]
