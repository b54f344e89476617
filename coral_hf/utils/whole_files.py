"""Writes files under a temporary name and renames them, so that readers see either the old or the new file completely."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, text: str, shared: bool = False) -> None:
    """Writes a text file completely, or leaves the existing one unchanged.

    Args:
        path (`str` or `Path`): a path in an existing folder.
        text (`str`)
        shared (`bool`): several processes may write the file at the same time, each to its own temporary file.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part" if shared else f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, shared: bool = False) -> None:
    """Writes an indented JSON file with [`write_whole`]."""
    write_whole(path, json.dumps(value, indent=2) + "\n", shared)


__all__ = ["write_json", "write_whole"]
