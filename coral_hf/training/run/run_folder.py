"""Identifies the run that a folder of checkpoints belongs to, by a run id in every checkpoint and in the folder."""

import re
import shutil
import uuid
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...drafter.weight_files import WEIGHTS_FILE
from ...utils.jsonl import read_json
from ...utils.replacing import check_replaceable
from ...utils.whole_files import write_json


PROGRESS_FILE = "coral_progress.json"  # in a checkpoint: values without a field in TrainerState
RUN_FILE = "_coral_run.json"  # in output_dir; `Trainer` does not push names that begin with `_`
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# files that a training replaces when it saves its drafter and card
_DRAFTER_FILES = ("config.json", WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", "README.md")


def new_run_id() -> str:
    return uuid.uuid4().hex[:12]


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, the earliest step first."""
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    numbered = [(int(match[1]), path) for path in found if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if path.is_dir()]


def run_of(folder: str | Path) -> str | None:
    """The id of the run that wrote a checkpoint or owns an output folder; None if none is recorded."""
    for name in (PROGRESS_FILE, RUN_FILE):
        if (path := Path(folder) / name).is_file():
            return read_json(path).get("run")
    return None


def last_of_run(folder: str | Path) -> Path | None:
    """The last checkpoint of the run that a folder belongs to; None without one."""
    found = checkpoints(folder)
    if not found:
        return None
    if (Path(folder) / RUN_FILE).is_file():
        run = run_of(folder)
    else:  # checkpoints without ids, or a run that was interrupted right after its first checkpoint
        run = run_of(max(found, key=lambda path: path.stat().st_mtime))
    return next((path for path in reversed(found) if run_of(path) == run), None)


def last_checkpoint(folder: Path) -> str:
    """Describes the last checkpoint of a folder's run, for a message."""
    if (last := last_of_run(folder)) is not None:
        return f"the last checkpoint is {last}"
    return f"{folder} contains no checkpoint" + (" of the run that wrote it last" if checkpoints(folder) else "")


def resume_folder(given: str | bool | None, output: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or the run's last one for True, `"true"` or `"last"`.

    Returns None for a folder without any checkpoint.

    Raises:
        ValueError: if the folder does not exist, or all checkpoints belong to other runs.
    """
    if given is None or given is False:
        return None
    if given is not True and str(given).lower() not in ("true", "last"):
        if not Path(given).is_dir():
            raise ValueError(f"resume_from_checkpoint={str(given)!r} is not a folder; {last_checkpoint(output)}.")
        return Path(given)
    if (found := last_of_run(output)) is None and checkpoints(output):
        raise ValueError(f"resume_from_checkpoint={given}: {last_checkpoint(output)}. Leave it out to start again.")
    return found


def check_run_folder(output: str | Path, given: str | bool | None = None, overwrite: bool = False) -> Path | None:
    """The checkpoint to resume from, if any.

    Args:
        output (`str` or `Path`): `output_dir` of the training.
        given (`str` or `bool`, *optional*): `resume_from_checkpoint`.
        overwrite (`bool`): whether another run's checkpoints and drafter in `output` may be replaced.

    Raises:
        ValueError: if the checkpoint does not exist, or if `output` contains a run or a model that the training neither
            resumes nor may replace.
    """
    output = Path(output)
    resumed = resume_folder(given, output)
    if not _is_in(resumed, output):
        saved = checkpoints(output)
        files = [name for name in _DRAFTER_FILES if (output / name).exists()]
        resume = "resume it with --resume_from_checkpoint last, " if saved and resumed is None else ""
        found = f"{saved[-1].name} of another run" if saved else f"a {files[0]}" if files else None
        remedies = f"{resume}name another --output_dir, or replace it with --overwrite_output_dir true"
        check_replaceable(output, found, overwrite, remedies)
    return resumed


def _is_in(resumed: Path | None, output: Path) -> bool:
    return resumed is not None and resumed.resolve().parent == output.resolve()


class RunFolder:
    """The output folder of one call of `train`, and the id of its run.

    Args:
        output (`Path`): `output_dir`.
        resumed (`Path`, *optional*): the checkpoint that the run resumes from. The run keeps its id only if that is the
            folder's last checkpoint. Otherwise the later checkpoints belong to another run.
    """

    def __init__(self, output: Path, resumed: Path | None):
        here = _is_in(resumed, output)
        last = last_of_run(output) if here else None
        same = resumed is not None and last is not None and last.resolve() == resumed.resolve()
        self.run = (run_of(resumed) if same and resumed is not None else None) or new_run_id()
        self._runs = {self.run, run_of(resumed) if here and resumed is not None else self.run}
        self._replaced = [] if here else checkpoints(output)
        self._written: set[str] = set()

    def claim(self, folder: Path, written: str | None = None) -> None:
        """Claims a folder for this run and removes the checkpoints that it replaces. Called after the run's first save.

        Args:
            folder (`Path`): the output folder, or the folder of a trial.
            written (`str`, *optional*): the name of the written checkpoint.
        """
        self._written.add(written or "")
        write_json(folder / RUN_FILE, {"run": self.run})
        for path in self._replaced:
            if path.name not in self._written:
                shutil.rmtree(path, ignore_errors=True)
        self._replaced = []

    def rotate(self, folder: Path, limit: int | None, best: str | None) -> None:
        """Removes the oldest checkpoints of this run and of the run that it resumed, down to `limit`.

        Transformers' own function would also count and remove checkpoints of other runs.

        Args:
            folder (`Path`): the output folder.
            limit (`int`, *optional*): `save_total_limit`; None and 0 keep all.
            best (`str`, *optional*): the best checkpoint, which is always kept, like the last one.
        """
        own = [path for path in checkpoints(folder) if run_of(path) in self._runs]
        own.sort(key=lambda path: run_of(path) == self.run)  # stable: by step within each run
        kept = {own[-1], *([] if best is None else [Path(best)])} if own else set()
        spare = [path for path in own if path not in kept]
        for path in spare[: max(len(own) - max(limit, len(kept)), 0)] if limit else ():
            shutil.rmtree(path, ignore_errors=True)


__all__ = [
    "PROGRESS_FILE",
    "RUN_FILE",
    "RunFolder",
    "check_run_folder",
    "checkpoints",
    "last_checkpoint",
    "last_of_run",
    "resume_folder",
    "run_of",
]
