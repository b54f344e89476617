"""Writes a trainer's records for the drafter's card, and pushes the drafter."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors import SafetensorError
from transformers import Trainer, trainer
from transformers.trainer_utils import has_length

from ...drafter.hub_names import public_name
from ...hub.model_card import write_card
from ...hub.publish import check_repository, hub_errors, prepare_folder, require_token, strip_paths
from ...hub.records import RECORD_FOLDER
from ...utils.code_version import __version__, code_commit
from ...utils.hardware import device_name
from .adapters import is_peft, rebuild, save_merged
from .run_folder import RunFolder, last_checkpoint


ARGUMENTS_FILE = "training_args.bin"
# arguments about places, which do not affect the training
_NOT_RECIPE = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token", "cache_features"}
_NOT_RECIPE |= {"report_to", "use_cpu", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "project"}
_NOT_RECIPE |= {"overwrite_output_dir"}


class PublishingMixin(Trainer):
    """Saves and pushes a drafter with its card and training record. Must precede [`~transformers.Trainer`] in the bases."""

    # the names given to `--data`, for the record; None if rows came from elsewhere
    data_names: list[str] | None = None
    chosen: dict[str, Any]  # settings chosen by the recipe, see `training.recipe`
    _earlier_stages: list[bytes] | None = None
    _folder: RunFolder | None

    def init_hf_repo(self, token: str | None = None, **kwargs: Any) -> None:
        token = token if token is not None else self.args.hub_token
        require_token(token)
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            super().init_hf_repo(token=token, **kwargs)
            if self.is_world_process_zero():
                check_repository(self.hub_model_id, self.args.hub_revision, token)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and folder != Path(self.args.output_dir):
            super().save_model(str(folder), _internal_call=True)  # a checkpoint: only what resuming needs
            return
        try:
            self._save_drafter(folder)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The drafter could not be written into {folder} ({error}); {last_checkpoint(Path(self.args.output_dir))}. "
                "Nothing of the training is lost while this process runs: free the disk and call save_model() again, or "
                "save_model(another_folder). Afterwards, resume from a checkpoint (--resume_from_checkpoint last)."
            ) from error
        if _internal_call:  # from `push_to_hub`, which adds card and record itself
            return
        if self.args.should_save:
            if self._folder is not None and folder == Path(self.args.output_dir):
                self._folder.claim(folder)
            self.write_training_record(folder)
            # Records of an earlier drafter in this folder must not end a training.
            write_card(folder, unmeasured=True, strict=False)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_drafter(self, folder: Path) -> None:
        """Saves the drafter in the form that `from_pretrained` loads: unsharded, in one file, with merged adapters."""
        # A checkpoint may be sharded. All processes take part.
        whole = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if is_peft(self.model):
            if self.args.should_save:
                model = self.accelerator.unwrap_model(self.model)
                save_merged(model if whole is None else rebuild(model, whole), folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
        elif whole is not None:
            self._save(str(folder), state_dict=whole)
        else:
            super().save_model(str(folder), _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Adapters alone are not a drafter, but `Trainer` would push a checkpoint's adapters. An adapted drafter is pushed merged,
        # when it is saved.
        if is_peft(self.model):
            return
        if self.args.should_save:
            strip_paths(checkpoint_folder)
        self._remove_arguments()
        # `Trainer` pickles its arguments to the folder, and uploads everything except names that begin with `_`.
        with patch.object(trainer, "TRAINING_ARGS_NAME", f"_{ARGUMENTS_FILE}"):
            super()._push_from_checkpoint(checkpoint_folder)
        self._remove_arguments()

    def _remove_arguments(self) -> None:
        """Removes the pickle, which may run code and contains local paths. Checkpoints keep theirs."""
        if self.args.should_save:
            for name in (ARGUMENTS_FILE, f"_{ARGUMENTS_FILE}"):
                (Path(self.args.output_dir) / name).unlink(missing_ok=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes like [`~transformers.Trainer.push_to_hub`], with the card that `coral-hf card` makes from the records in
        `output_dir/training`. Without a benchmark, its figures are "not measured".

        Raises:
            ValueError: without a token, offline, or for records of another drafter.
            OSError: if the Hub rejects the upload or the connection fails.
        """
        require_token(kwargs.get("token") or self.args.hub_token)
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, model_name: str | None = None, **stated: Any) -> None:
        """Writes card, code and `custom_generate/` to `output_dir`.

        Args:
            model_name (`str`, *optional*): heading of the card.
            **stated: keys of `training/card.json` (`license`, `language`, `tags`, `datasets`, ...).
        """
        if not self.is_world_process_zero():
            return
        if model_name is not None:
            stated = {"title": model_name, **stated}
        self._remove_arguments()
        self.write_training_record(Path(self.args.output_dir))
        prepare_folder(self.args.output_dir, self.hub_model_id, stated)

    def write_training_record(self, folder: Path) -> None:
        """Writes `training/training.json` and `training/log.jsonl`, and `training-N.json` for the drafter's earlier stages."""
        training = folder / RECORD_FOLDER
        training.mkdir(parents=True, exist_ok=True)
        if self._earlier_stages is None:  # before the first record, which may overwrite them
            self._earlier_stages = _stages(self.model.config._name_or_path)
            for path in training.glob("training-[0-9]*.json"):  # from another drafter in this folder
                path.unlink()
        for number, stage in enumerate(self._earlier_stages, start=1):
            (training / f"training-{number}.json").write_bytes(stage)
        record = {
            "stage": self.args.stage,
            "target": public_name(self.target_model.config._name_or_path),
            "data": None if self.data_names is None else [public_name(name) for name in self.data_names],
            "steps": self.state.global_step,
            "conversations": _conversations(self.train_dataset),
            "response_tokens_seen": self.tokens_seen,
            "arguments": recipe(self.args),
            "chosen": self.chosen,
            "environment": {
                "device": device_name(self.args.device),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "coral_hf": __version__,
                "commit": code_commit(),
            },
        }
        (training / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        rows = "".join(json.dumps(row) + "\n" for row in self.state.log_history)
        (training / "log.jsonl").write_text(rows, encoding="utf-8")


def _stages(folder: str | None) -> list[bytes]:
    """The records of a drafter's training stages so far, the first stage first."""
    paths = Path(folder, RECORD_FOLDER).glob("training*.json") if folder else ()
    # training-1.json, training-2.json, ..., and training.json is the last
    numbered = sorted(paths, key=lambda path: (path.stem == "training", len(path.stem), path.stem))
    return [path.read_bytes() for path in numbered]


def recipe(args: Any) -> dict[str, Any]:
    """The preset, and the training arguments that differ from their defaults."""
    settings = {name: value for name, value in args.non_defaults().items() if name not in _NOT_RECIPE}
    # a settings file, for example DeepSpeed's
    named = {name: public_name(value) for name, value in settings.items() if str(value).startswith("/")}
    return {"preset": args.preset, **settings, **named}


def _conversations(dataset: Any) -> int | None:
    """The number of conversations in a data set, packed or not; None for a stream."""
    dataset = getattr(dataset, "dataset", dataset)
    if dataset is None:
        return 0
    return len(dataset) if has_length(dataset) else None


__all__ = ["PublishingMixin", "recipe"]
