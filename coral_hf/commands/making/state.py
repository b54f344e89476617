"""The progress of `coral-hf make`, in one file of its folder, so that a second call skips finished stages."""

import json
from pathlib import Path
from typing import Any

from ...utils.jsonl import read_json
from ...utils.whole_files import write_json


STATE_FILE = "make.json"


class MakeState:
    """The settings of a make and the results of its finished stages.

    Args:
        folder (`str` or `Path`): the folder of all stages: new, empty, or from an earlier call.
        settings (`dict`): settings that determine the results. They must equal those of an earlier call.

    Raises:
        ValueError: if the folder contains other files, or a make with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder = Path(folder)
        self.path = self.folder / STATE_FILE
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            record = read_json(self.path)
            earlier = record.get("settings") or {}
            for name, value in json.loads(json.dumps(settings)).items():
                if earlier.get(name) != value:
                    raise ValueError(
                        f"{folder} contains a make with {name}={earlier.get(name)!r}, but this call has {value!r}. Use the same value to "
                        "resume it, or another --output."
                    )
            self.stages = record["stages"]
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{folder} does not contain a make: give --output a new or an empty folder.")
        self.settings = settings

    def of(self, stage: str) -> dict[str, Any] | None:
        """The results of a stage; None if it is not finished."""
        return self.stages.get(stage)

    def begin(self) -> None:
        """Claims the folder before the first stage writes to it, so that an interrupted first stage resumes too."""
        if not self.path.exists():
            self._write()

    def finish(self, stage: str, **found: Any) -> dict[str, Any]:
        """Records that a stage is finished."""
        self.stages[stage] = found
        self._write()
        return found

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"settings": self.settings, "stages": self.stages})

    @property
    def seconds(self) -> float:
        """Seconds spent in the finished stages."""
        return sum(found.get("seconds", 0.0) for found in self.stages.values())


__all__ = ["STATE_FILE", "MakeState"]
