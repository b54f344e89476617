"""The files of regeneration: prompts in, response rows out (JSONL while running, Parquet shards for storage)."""

import contextlib
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..data.prompts import as_prompt
from ..data.response_origin import COLUMNS, Origin
from ..data.row_reader import row_id
from ..data.sources import Reading
from ..utils.jsonl import read_jsonl
from ..utils.replacing import check_replaceable
from .job_queue import Conversation


def iter_prompts(
    data: Any, split: str = "train", columns: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """
    Reads the user turns of conversations in any format of docs/data_formats.md.

    Args:
        data:
            One source or several, see [`Reading`]. The user's `messages` are the turns. Rows may contain a `system` text.
            Other keys are kept. Rows without an id get a hash of their texts as id, and repetitions of them are skipped.
        split (`str`, defaults to `"train"`):
            The split of data sets with several splits.
        columns (`dict[str, str]`, *optional*):
            Names in the formats, each with the data's own name for it.

    Returns:
        `Iterator[dict]`: the rows in order, with `id`, `turns` and `system` if there is one.

    Raises:
        ValueError: if a source is missing, or a line is malformed or repeats an id (with its number).
    """
    seen: dict[str, str] = {}
    n_repeated = 0
    reading = Reading(data, split, columns=columns)
    for where, known, found in reading:
        name, is_made = row_id(found, where)
        if is_made and name in seen:
            n_repeated += 1
            continue
        if name in seen:
            raise ValueError(
                f"{where}: id {name!r} already occurs on {seen[name]}; ids must be unique (--columns id=COLUMN takes another)."
            )
        seen[name] = where
        yield {**as_prompt(known, found, where), "id": name}
    if not seen:
        raise ValueError(f'{reading.names} contains no prompts: give a file with rows such as {{"prompt": "Hi!"}}.')
    print(reading.told(), flush=True)
    if n_repeated:
        print(f"{n_repeated:,} rows repeat an earlier prompt and are left out.", flush=True)


def iter_responses(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """
    Reads response rows in the format of [`regenerate`].

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl` or `.jsonl.gz` file with `{"id", "turn", "prompt_ids", "response_ids"}`. A missing `turn` is 0.

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


TEMPLATE_COLUMN = "chat_template_kwargs"
_OPTIONAL = (*COLUMNS, "prompt_hash", TEMPLATE_COLUMN)  # columns of shards whose rows have them


@contextlib.contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Locks `output` for this process, and removes an incomplete last line.

    Raises:
        ValueError: if another process is writing it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(f"{output}.lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(f"another process is writing {output}; wait for it or give another output.") from error
    with lock:
        _check_ours(output)
        drop_incomplete_line(output)
        yield


def _check_ours(output: Path) -> None:
    """Raises `ValueError` if removing an incomplete last line would damage a file that does not contain answers."""
    if not output.exists() or (place := whole_lines(output)) == output.stat().st_size:
        return
    with output.open("rb") as file:
        first = file.readline() if place else b""
        file.seek(place)
        tail = file.read()
    start = b'{"id":"'  # the beginning of every row written here
    ours = tail.startswith(start) or start.startswith(tail)
    if whole := first or (tail if tail.rstrip().endswith(b"}") else b""):
        ours = ours and any(name in whole for name in (b'"response_ids"', b'"responses"'))
    found = None if ours else "something else than answers"
    check_replaceable(output, found, False, "give another output file")


class AnswerWriter:
    """Appends and flushes lines, counts answers and updates the progress bar.

    Args:
        output (`Path`): JSONL file.
        conversations (`list[Conversation]`): conversations to answer. Their open turns are the bar's length.
        progress (`bool`): show the bar.
        counted (`Iterable[str]`): names of counts in addition to `n_responses` and `n_response_tokens`.
    """

    def __init__(self, output: Path, conversations: list[Conversation], progress: bool, counted: Iterable[str] = ()):
        self.output, self.file, self.failed = output, output.open("a", encoding="utf-8"), False
        self.n_turns = sum(len(item.turns) - len(item.answers) for item in conversations)
        self.bar = tqdm(total=self.n_turns, unit="turn", desc="regenerate", disable=not progress, smoothing=0.02)
        self.counts = dict.fromkeys(("n_responses", "n_response_tokens", *counted), 0)
        self.started = time.perf_counter()

    def append(self, line: str) -> None:
        """Writes a line.

        Raises:
            OSError: if it cannot be written. Earlier lines are kept.
        """
        try:
            self.file.write(line + "\n")
            self.file.flush()
        except OSError as error:
            self.failed = True
            raise OSError(
                f"{self.output} could not be written ({error}). Free the disk and run the same command again to resume from the "
                "answers on file."
            ) from error

    def count_answer(self, n_tokens: int) -> None:
        """Counts an answer and its tokens."""
        self.counts["n_responses"] += 1
        self.counts["n_response_tokens"] += n_tokens
        self.bar.set_postfix_str(f"{self.stats()['tokens_per_second']:.0f} tokens/s", refresh=False)
        self.bar.update()

    def stats(self) -> dict[str, Any]:
        """The counts, the `seconds` since the start, and `tokens_per_second`."""
        seconds = time.perf_counter() - self.started
        return {**self.counts, "seconds": seconds, "tokens_per_second": self.counts["n_response_tokens"] / seconds}

    def close(self) -> None:
        self.bar.close()
        # after a full disk, closing tries in vain to write the rest
        with contextlib.suppress(*([OSError] if self.failed else [])):
            self.file.close()


def whole_lines(path: Path) -> int:
    """The number of bytes of a file up to its last newline."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
    return 0


def drop_incomplete_line(path: Path) -> None:
    """Removes an incomplete last line, which an interruption in the middle of a write leaves."""
    if path.exists() and (end := whole_lines(path)) != path.stat().st_size:
        os.truncate(path, end)


def write_shards(
    rows: str | os.PathLike | Iterable[dict[str, Any]],
    directory: str | os.PathLike,
    rows_per_shard: int = 5000,
) -> list[Path]:
    """
    Packs response rows into Parquet shards of ids (zstd; uint16 if the vocabulary allows, else int32), which `datasets`
    and [`read_rows`] can read. Existing shards are kept, and new numbers continue from theirs. Answers that existing shards
    contain (same id, turn and temperature) are not packed again. Either all new shards appear or none.

    Args:
        rows (`str`, `os.PathLike` or `Iterable[dict]`):
            A JSONL file of [`regenerate`], or its rows.
        directory (`str` or `os.PathLike`):
            The folder for `responses-00000.parquet` and so on.
        rows_per_shard (`int`, defaults to 5000):
            Rows of a shard.

    Returns:
        `list[Path]`: the written shards; empty if all answers are already packed.

    Raises:
        ValueError: on a malformed row, without any row, or if a shard in the directory is damaged or contains answers of
            another target.
        ImportError: if pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Writing Parquet needs pyarrow: pip install 'coral-hf[train]'.") from error
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}.")
    source = f"{rows} contains" if isinstance(rows, str | os.PathLike) else "the list contains"
    if isinstance(rows, str | os.PathLike):
        rows = list(iter_responses(rows))
    else:
        rows = [_checked_response(row, f"row {number}") for number, row in enumerate(rows)]
    if not rows:
        raise ValueError(f"{source} no rows to write; make some with `coral-hf regenerate`.")
    directory = Path(directory)
    shards = sorted(directory.glob("responses-[0-9]*.parquet"))
    packed: set[tuple[str, int, float]] = set()
    optional = sorted({name for row in rows for name in _OPTIONAL if row.get(name) is not None}, key=_OPTIONAL.index)
    ours = {Origin.read(row) for row in rows}
    for shard in shards:
        keys, columns, origins = _packed_answers(shard)
        packed.update(keys)
        if shard == shards[0]:  # all shards of a folder need the same columns, or `datasets` cannot read them
            optional = [name for name in _OPTIONAL if name in columns]
        for other, one in ((other, one) for other in origins for one in ours if other.contradicts(one)):
            raise ValueError(
                f"{shard} contains answers of {other}, but {source} those of {one}: pack them into another folder."
            )
    rows = [row for row in rows if _answer_key(row) not in packed]
    if not rows:
        return []
    largest = max(max([*row["prompt_ids"], *row["response_ids"]], default=0) for row in rows)
    ids_type = pyarrow.list_(pyarrow.uint16() if largest < 2**16 else pyarrow.int32())
    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("turn", pyarrow.int32()),
            ("temperature", pyarrow.float32()),  # 0: greedy
            *((name, pyarrow.string()) for name in optional),
            ("prompt_ids", ids_type),
            ("response_ids", ids_type),
        ]
    )
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem.rsplit("-", 1)[1]) for path in shards]
    next_number = max(numbers, default=-1) + 1
    partial: list[tuple[Path, Path]] = []
    try:
        for index, start in enumerate(range(0, len(rows), rows_per_shard)):
            final = directory / f"responses-{next_number + index:05d}.parquet"
            beside = directory / f".{final.name}.partial"
            partial.append((beside, final))
            chunk = [_shard_row(row) for row in rows[start : start + rows_per_shard]]
            table = pyarrow.Table.from_pylist(chunk, schema=schema)
            pyarrow.parquet.write_table(
                table, beside, compression="zstd", compression_level=19, use_dictionary=["id", *COLUMNS]
            )
        for beside, final in partial:
            os.replace(beside, final)
    finally:
        for beside, _ in partial:
            beside.unlink(missing_ok=True)
    return [final for _, final in partial]


def _shard_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the format of shards, in which an object with arbitrary keys cannot be a column."""
    kwargs = row.get(TEMPLATE_COLUMN)
    text = json.dumps(kwargs) if isinstance(kwargs, dict) else kwargs
    return {"temperature": 0.0, **row, TEMPLATE_COLUMN: text}


def _answer_key(row: dict[str, Any]) -> tuple[str, int, float]:
    """The key of an answer: id, turn and temperature, in float32 as in shards."""
    (temperature,) = struct.unpack("f", struct.pack("f", row.get("temperature") or 0.0))
    return row["id"], row.get("turn") or 0, temperature


def _packed_answers(shard: Path) -> tuple[list[tuple[str, int, float]], list[str], set[Origin]]:
    """The answers in a shard, its columns, and the target that wrote them."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(shard) as file:
            columns = file.schema_arrow.names
            named = [name for name in COLUMNS if name in columns]
            rows = file.read(columns=["id", "turn", "temperature", *named]).to_pylist()
        return [_answer_key(row) for row in rows], columns, {Origin.read(row) for row in rows}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{shard} is damaged or not a shard of answers ({reason}). Remove it, or pack into another folder."
        ) from error
