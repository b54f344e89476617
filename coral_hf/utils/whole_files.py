"""Files that are written beside their place and renamed, so that a reader finds the old one or the new one, whole."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, text: str, shared: bool = False) -> None:
    """Writes a text file, or leaves the one that is there.

    Args:
        path (`str` or `Path`): in a folder that exists.
        text (`str`)
        shared (`bool`): several processes may write the file at once; each then writes a part of its own.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part" if shared else f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, shared: bool = False) -> None:
    """Writes a JSON file as [`write_whole`] does, indented."""
    write_whole(path, json.dumps(value, indent=2) + "\n", shared)


__all__ = ["write_json", "write_whole"]
