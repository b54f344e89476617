"""Rows of JSON, CSV and text files, with errors that name the file and the line."""

import contextlib
import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .jsonl import LONGEST_LINE, parse_json, read_lines


# The format of a file, by the end of its name.
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".txt",)
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
KINDS = ".jsonl, .json, .csv, .tsv, .txt (each also as .gz) or .parquet"

_LONGEST_ARRAY = 1 << 31
_ENCODING = "utf-8-sig"  # Windows writes a byte-order mark
_SEPARATORS = (",", "\t", ";")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error)


def read_rows_of_file(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of a file of JSON lines, a JSON array, a table with a header, or text with one prompt per line.

    Args:
        path (`str` or `os.PathLike`): the file. Its name determines the format. Other names are read as JSON if the file
            begins like JSON.

    Raises:
        ValueError: if the file is missing, or its content does not match its name.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; give the path of a {KINDS} file.")
    suffix = kind_of(path)
    try:
        begin = _beginning(path)
        if suffix in TABLE_SUFFIXES:
            yield from _table(path)
        elif suffix in TEXT_SUFFIXES:
            yield from _prompts(path)
        elif begin.startswith("["):
            yield from _array(path)
        elif suffix in JSON_SUFFIXES or begin.startswith(("{", '"')) or not begin:
            yield from _objects(path)
        else:
            raise ValueError(
                f"{path} cannot be read as data ({suffix or 'no suffix'}); give a {KINDS} file, such as text with a "
                "prompt per line, named prompts.txt."
            )
    except _DAMAGED as error:
        raise ValueError(
            f"{path}: the file is cut off, or its content does not match its name ({error}). Fetch it again, or save it as UTF-8."
        ) from error


def kind_of(path: Path) -> str:
    """The suffix of a path, without that of its compression."""
    suffixes = path.suffixes
    if path.suffix == ".gz":
        return suffixes[-2].lower() if len(suffixes) > 1 and suffixes[-2].lower() in SUFFIXES else ".jsonl"
    return path.suffix.lower()


def _open(path: Path) -> io.TextIOBase:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding=_ENCODING, newline="")


def _beginning(path: Path) -> str:
    """The first non-blank character. Empty for an unreadable file, whose error names the line later."""
    with contextlib.suppress(*_DAMAGED), _open(path) as file:
        return file.read(4096).lstrip()[:1]
    return ""


def _prompts(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path, _ENCODING):
        if "\0" in line:
            raise ValueError(
                f"{path}, line {number} contains bytes that are not text; give a text file with one prompt per line."
            )
        yield f"{path}, line {number}", {"prompt": line.strip()}


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path, _ENCODING):
        where = f"{path}, line {number}"
        if number == 1 and line.strip() == "{":
            raise ValueError(
                f"{where}: one object over several lines; write one row per line, or an array of rows, [{{...}}]."
            )
        remedy = "Fix or remove that line."
        if number == 1:
            remedy = "Fix or remove that line; plain text with one prompt per line is read from a .txt file."
        yield where, _checked(parse_json(line, where, remedy), where, remedy)


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        text = file.read(_LONGEST_ARRAY)
    if len(text) == _LONGEST_ARRAY:
        raise ValueError(
            f"{path}: an array of more than {_LONGEST_ARRAY:,} characters; write one row per line (.jsonl)."
        )
    rows = parse_json(
        text, str(path), "The array is cut off or damaged: write it again, or one row per line (.jsonl)."
    )
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        yield where, _checked(row, where, "Fix or remove that row.")


def _checked(row: Any, where: str, remedy: str) -> Any:
    if not isinstance(row, dict | str):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}. {remedy}")
    return row


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table whose first line names its columns; empty cells are None."""
    csv.field_size_limit(LONGEST_LINE)
    with _open(path) as file:
        header = file.readline(LONGEST_LINE)
        separator = "\t" if kind_of(path) == ".tsv" else max(_SEPARATORS, key=header.count)
        names = next(csv.reader([header], delimiter=separator, strict=True), [])
        if len(set(names)) < len(names):
            raise ValueError(f"{path}, line 1: the header names a column twice ({', '.join(names)}); rename one.")
        rows = csv.reader(file, delimiter=separator, strict=True)
        for cells in rows:
            where = f"{path}, line {rows.line_num + 1}"
            if not any(cells):
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{where} has {len(cells)} cells, but the header names {len(names)} columns ({', '.join(names)}). Quote texts "
                    f'that contain "{separator}", or fix the line.'
                )
            yield where, {name: cell or None for name, cell in zip(names, cells, strict=True)}


__all__ = ["KINDS", "SUFFIXES", "kind_of", "read_rows_of_file"]
