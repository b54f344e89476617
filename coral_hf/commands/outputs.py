"""Checks output paths and files of earlier runs, before the work whose results go there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.jsonl import read_json
from ..utils.replacing import check_replaceable


@dataclass(kw_only=True)
class OutputOptions:
    """The options of verbs that write files with fixed names."""

    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace files of another run. Without this, they are kept and the run stops with an error."
        },
    )

    def check_record(self, path: str | Path, measured: Mapping[str, Any], option: str = "output") -> None:
        """Raises `ValueError` if the file contains a record of other measurements than this run's.

        Args:
            path (`str` or `Path`): the JSON file to write.
            measured (`dict`): keys of the record that describe the measurement. Keys that a record of an older version lacks
                are not compared.
            option (`str`): the option for the path.
        """
        found = None if not Path(path).exists() else _other_record(Path(path), json.loads(json.dumps(measured)))
        remedies = f"give another --{option}, or replace it with --overwrite true"
        check_replaceable(path, found, self.overwrite, remedies)


def check_output_folder(path: str | Path | None, option: str = "output") -> None:
    """Raises `ValueError` if an output folder, or a parent of it, is a file; None means no folder."""
    if path is None:
        return
    for place in (Path(path), *Path(path).parents):
        if place.is_dir():
            return
        if place.exists():
            raise ValueError(f"--{option} {path}: {place} is a file; give a folder, new or existing.")


def check_output_file(path: str | Path | None, option: str = "json", make_folder: bool = False) -> None:
    """Raises `ValueError` if an output file is a folder, or its parent is not one; None means no file.

    Args:
        path (`str` or `Path`, *optional*), option (`str`): the path and its option.
        make_folder (`bool`): create a missing folder.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"--{option} {path} is a folder; give the path of a file.")
    if make_folder:
        check_output_folder(Path(path).parent, option)
    elif not Path(path).parent.is_dir():
        raise ValueError(f"--{option} {path}: its folder does not exist; make it first.")


def finished(*wrote: str | Path | None, then: str | None = None) -> None:
    """Prints the last lines of a verb: the files that it wrote, and the command that usually follows.

    Args:
        *wrote (`str` or `Path`, *optional*): files and folders; None is skipped.
        then (`str`, *optional*): the command, complete except for words in capitals.
    """
    if any(wrote):
        print(f"Wrote {', '.join(str(place) for place in wrote if place)}")
    if then is not None:
        print(f"Next: {then}")


def _other_record(path: Path, measured: Mapping[str, Any]) -> str | None:
    """Describes the content of a file that is not a record of the same measurement."""
    try:
        record = read_json(path)
    except ValueError:
        return "something else than a record"
    if not record.keys() & measured.keys():
        return "something else than a record"
    for name, value in measured.items():
        if name in record and record[name] != value:
            return f"a record with another {name} ({_short(record[name])}, here {_short(value)})"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["OutputOptions", "check_output_file", "check_output_folder", "finished"]
