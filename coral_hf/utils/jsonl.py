"""Reading JSON and JSONL files, with errors that name the file and the line."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# longer lines are not rows, and a small .gz can contain one that fills the memory
LONGEST_LINE = 1 << 28


def parse_json(text: str, where: str, remedy: str) -> Any:
    """The value of a JSON text. `ValueError` with `where` and `remedy` if it is invalid, nested too deeply or too long."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}). {remedy}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if the file cannot be read or contains anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); write it again or delete it.") from error
    value = parse_json(text, str(path), "Write it again or delete it.")
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} must contain a JSON object, got {type(value).__name__}; write it again or delete it."
        )
    return value


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row) of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        ValueError: if the file is missing or a line is not a JSON object (with the line's number).
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; give the path of a .jsonl or .jsonl.gz file.")
    for number, line in read_lines(path):
        yield number, _row(line, f"{path}, line {number}")


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yields (line number, line) of a text file, `.gz` or not, without its blank lines.

    Raises:
        ValueError: for a line that is too long, or a file whose content does not match its name.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding=encoding) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), start=1):
                if len(line) == LONGEST_LINE:
                    raise ValueError(
                        f"{path}, line {number}: longer than {LONGEST_LINE:,} characters, which is too long for a row. Write one row per line."
                    )
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, after line {number}: the file is cut off, or its content does not match its name ({error}). Fetch it again, or "
            "save it as UTF-8."
        ) from error


def _row(line: str, where: str) -> dict[str, Any]:
    row = parse_json(line, where, "Fix or remove that line.")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}. Fix or remove that line.")
    return row


__all__ = ["LONGEST_LINE", "parse_json", "read_json", "read_jsonl", "read_lines"]
