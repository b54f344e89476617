"""The files around regeneration: prompts in, response rows out (JSONL while it runs, Parquet shards to keep)."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..jsonl import read_jsonl


def iter_prompts(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """
    Reads conversations, user turns only.

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl` or `.jsonl.gz` file with one `{"id": str, "turns": [str, ...]}` a line; other keys are kept.

    Returns:
        `Iterator[dict]`: the rows in file order.

    Raises:
        ValueError: if the file is missing, or a line is malformed or repeats an id (with its number).
    """
    seen: dict[str, int] = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if not isinstance(row.get("id"), str) or not row["id"]:
            raise ValueError(f'{where}: "id" must be a non-empty string, got {row.get("id")!r}.')
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f'{where}: "turns" must be a non-empty list of strings, got {str(turns)[:60]!r}.')
        if row["id"] in seen:
            raise ValueError(
                f"{where}: id {row['id']!r} already stands on line {seen[row['id']]}; ids must be unique."
            )
        seen[row["id"]] = number
        yield row


def iter_responses(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """
    Reads response rows as [`regenerate`] writes them.

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl` or `.jsonl.gz` file with `{"id", "turn", "prompt_ids", "response_ids"}`; an absent `turn` is 0.

    Returns:
        `Iterator[dict]`: the rows in file order.

    Raises:
        ValueError: if the file is missing or a line is malformed (with its number).
    """
    for number, row in read_jsonl(path):
        yield _checked_response(row, f"{path}, line {number}")


def _checked_response(row: dict[str, Any], where: str) -> dict[str, Any]:
    row = {"turn": 0, **row}
    if not isinstance(row.get("id"), str):
        raise ValueError(f'{where}: "id" must be a string, got {row.get("id")!r}.')
    if type(row["turn"]) is not int or row["turn"] < 0:
        raise ValueError(f'{where}: "turn" must be a number from 0, got {row["turn"]!r}.')
    for key in ("prompt_ids", "response_ids"):
        ids = row.get(key)
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f'{where}: "{key}" must be a list of token ids, got {str(ids)[:60]!r}.')
    return row


def drop_incomplete_line(path: Path) -> None:
    """Cuts off a last line without its newline, which is what a kill in the middle of a write leaves."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        position = end = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position != end:
            file.truncate(position)


def write_shards(
    rows: str | os.PathLike | Iterable[dict[str, Any]],
    directory: str | os.PathLike,
    rows_per_shard: int = 5000,
) -> list[Path]:
    """
    Packs response rows into Parquet shards of ids (zstd; uint16 where the vocabulary allows, else int32), which
    `datasets` and [`read_rows`] read. Shards that stand in the directory already are kept and the numbers go on from
    theirs. All new shards appear, or none.

    Args:
        rows (`str`, `os.PathLike` or `Iterable[dict]`):
            A JSONL file of [`regenerate`], or its rows.
        directory (`str` or `os.PathLike`):
            Where `responses-00000.parquet` and so on go.
        rows_per_shard (`int`, defaults to 5000):
            Rows of a shard.

    Returns:
        `list[Path]`: the shards written.

    Raises:
        ValueError: on a malformed row, or without any row.
        ImportError: if pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Writing Parquet needs pyarrow: pip install 'coral-hf[train]'.") from error
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}.")
    if isinstance(rows, str | os.PathLike):
        rows = list(iter_responses(rows))
    else:
        rows = [_checked_response(row, f"row {number}") for number, row in enumerate(rows)]
    if not rows:
        raise ValueError("there are no rows to write.")
    largest = max(max([*row["prompt_ids"], *row["response_ids"]], default=0) for row in rows)
    ids_type = pyarrow.list_(pyarrow.uint16() if largest < 2**16 else pyarrow.int32())
    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("turn", pyarrow.int32()),
            ("temperature", pyarrow.float32()),  # 0: greedy
            ("prompt_ids", ids_type),
            ("response_ids", ids_type),
        ]
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem.rsplit("-", 1)[1]) for path in directory.glob("responses-[0-9]*.parquet")]
    next_number = max(numbers, default=-1) + 1
    partial: list[tuple[Path, Path]] = []
    try:
        for index, start in enumerate(range(0, len(rows), rows_per_shard)):
            final = directory / f"responses-{next_number + index:05d}.parquet"
            beside = directory / f".{final.name}.partial"
            partial.append((beside, final))
            chunk = [{"temperature": 0.0, **row} for row in rows[start : start + rows_per_shard]]
            table = pyarrow.Table.from_pylist(chunk, schema=schema)
            pyarrow.parquet.write_table(table, beside, compression="zstd", compression_level=19, use_dictionary=["id"])
        for beside, final in partial:
            os.replace(beside, final)
    finally:
        for beside, _ in partial:
            beside.unlink(missing_ok=True)
    return [final for _, final in partial]
