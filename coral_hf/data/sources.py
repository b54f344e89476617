"""Files, folders, data sets and Python objects -> rows. All training, answering and measuring reads data here."""

import copy
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.row_files import KINDS, SUFFIXES, kind_of, read_rows_of_file
from .conversations import chat_of
from .formats import Format
from .row_reader import check_answered, check_columns, has_answers, read_row


_SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:]+))?(:(?P<config>.+))?")
# Kinds of formats that may be mixed in a training. Ids belong to one tokenizer, and text has no turns.
_TOGETHER = {"turns": "chat", "messages": "chat"}


def read_rows(
    data: Any, split: str = "train", columns: Mapping[str, str] | None = None, tell: bool = True
) -> list[dict[str, Any]]:
    """Reads all training rows, in any format of docs/data_formats.md.

    Args:
        data: one source or several; see [`Reading`].
        split (`str`), columns (`dict[str, str]`, *optional*): see [`Reading`].
        tell (`bool`): print the format and the number of rows.

    Raises:
        ValueError: on a missing source, a malformed line (with its number), rows without answers or of several kinds.
    """
    stream = RowStream(data, split, streaming=False, columns=columns, tell=tell)
    rows = list(stream)
    if not rows:
        raise ValueError(f"{stream.reading.names}: no rows to train on.")
    return rows


def given_rows(data: Any) -> Any:
    """A trainer's rows: reads paths, Hub ids, tables and lists of these, and returns anything else unchanged."""
    is_list = (
        isinstance(data, list | tuple) and bool(data) and all(isinstance(item, str | os.PathLike) for item in data)
    )
    if isinstance(data, str | os.PathLike) or is_list or _is_table(data):
        return read_rows(data)
    return data


class Reading:
    """Rows of any source and format as standard rows, counted by source and format.

    Args:
        data: a path or Hub id (see [`iter_source`]), or several; a list of prompts (strings) or of rows (`dict`), a
            `datasets.Dataset`, a `pandas.DataFrame`, or another iterable of rows.
        split (`str`): the split of data sets with several splits.
        streaming (`bool`): stream data sets of the Hub instead of fetching them first.
        columns (`dict[str, str]`, *optional*): names in the formats, each with the data's own name for it.

    Raises:
        ValueError: for `data` of another kind, and while iterating for malformed rows, with their place.
    """

    def __init__(
        self, data: Any, split: str = "train", streaming: bool = False, columns: Mapping[str, str] | None = None
    ):
        check_columns(columns)
        self.sources = _sources(data)
        self.split, self.streaming, self.columns = split, streaming, columns
        self.counts: dict[tuple[str, str], list[int]] = {}

    @property
    def names(self) -> str:
        """The names of the sources in messages."""
        return ", ".join(_name(source) for source in self.sources)

    def __iter__(self) -> Iterator[tuple[str, Format, dict[str, Any]]]:
        self.counts = {}
        for source in self.sources:
            yield from self.rows_of(source)

    def rows_of(self, source: Any) -> Iterator[tuple[str, Format, dict[str, Any]]]:
        """Yields (place, format, row) of one of the `sources`."""
        is_place = isinstance(source, str | os.PathLike)
        rows = iter_source(source, self.split, self.streaming) if is_place else _rows_of(source, self.split)
        for where, found in rows:
            known, row = read_row(found, where, self.columns)
            count = self.counts.setdefault((_name(source), known.name), [0, 0])
            count[0] += 1
            count[1] += has_answers(known, row)
            yield where, known, row

    def told(self) -> str:
        """A line for each source and format, with the number of rows."""
        lines = []
        for (source, name), (n_rows, n_answered) in self.counts.items():
            holding = {0: "prompts without answers", n_rows: "with answers"}.get(
                n_answered, f"{n_answered:,} with answers, {n_rows - n_answered:,} without"
            )
            lines.append(f"Read {n_rows:,} row{'s' * (n_rows != 1)} of {source} as {name}: {holding}.")
        return "\n".join(lines)


class RowStream:
    """Training rows as in [`read_rows`], read while they are used, from the start in every iteration.

    Args:
        data, split, columns: see [`Reading`].
        streaming (`bool`): stream data sets of the Hub instead of fetching them first.
        tell (`bool`): print once what is read: after a whole pass, or at the first row of a stream from the Hub.
    """

    def __init__(
        self,
        data: Any,
        split: str = "train",
        streaming: bool = True,
        columns: Mapping[str, str] | None = None,
        tell: bool = True,
    ):
        self.reading = Reading(data, split, streaming, columns)
        self._tell = tell
        self._left_out: Container[str] = ()
        self._key_of: Callable[[dict[str, Any]], str] | None = None

    def without(self, keys: Container[str], key_of: Callable[[dict[str, Any]], str]) -> "RowStream":
        """The same stream without rows whose key is in `keys`."""
        rest = copy.copy(self)
        rest._left_out, rest._key_of = keys, key_of
        return rest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        key_of = self._key_of
        return (row for row in self._rows() if key_of is None or key_of(row) not in self._left_out)

    def _rows(self) -> Iterator[dict[str, Any]]:
        first: tuple[Format, str] | None = None
        for where, known, row in self.reading:
            if first is None:
                check_answered(known, row, where)  # later rows without an answer are skipped and counted
            if known.kind in _TOGETHER and has_answers(known, row):
                chat_of(row, known, where)  # checked here, where the line is known
            if first is None:
                first = known, where
                if self._tell and self.reading.streaming:  # the last row may never be read
                    self._tell = False
                    print(f"Reading {self.reading.names} as {known.name} while training.", flush=True)
            if _TOGETHER.get(known.kind, known.kind) != _TOGETHER.get(first[0].kind, first[0].kind):
                raise ValueError(
                    f"{where} is a row of {known.name}, but {first[1]} is one of {first[0].name}. Train on files of one kind: "
                    "conversations, token ids, or text."
                )
            yield row
        if self._tell:
            self._tell = False
            print(self.reading.told(), flush=True)


def iter_source(path: str | os.PathLike, split: str = "train", streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (where, row) of a source, with rows as on file.

    Args:
        path: a file of JSON lines or a JSON array, CSV, text (one prompt per line) or Parquet; a folder of such files, or of
            `save_to_disk`; or a data set on the Hub: `org/name`, `org/name@revision`, `org/name:config`.
        split (`str`): of data sets with several splits.
        streaming (`bool`): read data sets of the Hub while they are used instead of fetching them first.

    Raises:
        ValueError: if the source does not exist, or its content does not match its name.
    """
    place = Path(path)
    if place.is_dir() and any((place / name).is_file() for name in _SAVED):
        yield from _numbered(f"{path}", _saved(place, split))
    elif place.is_dir():
        shards = sorted(place.glob("*.parquet")) or sorted(file for file in place.iterdir() if _is_row_file(file))
        if not shards:
            raise ValueError(
                f"{path} is a folder without rows: it contains no .parquet shards, no other files of rows ({KINDS}), and no data "
                "set of save_to_disk. Give another folder."
            )
        for shard in shards:
            yield from iter_source(shard)
    elif place.suffix == ".parquet":
        yield from _read_parquet(place)
    elif not place.exists() and not _is_row_file(place) and _HUB_ID.fullmatch(str(path)):
        yield from _numbered(f"{path}, split {split}", _from_hub(str(path), split, streaming))
    else:
        yield from read_rows_of_file(place)


def _is_row_file(path: Path) -> bool:
    return kind_of(path) in SUFFIXES


def _sources(data: Any) -> list[Any]:
    """The data argument as a list of paths, Hub ids and iterables of rows."""
    if isinstance(data, str | os.PathLike):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, bytes):
        raise ValueError(
            f"data of type {type(data).__name__} ({str(data)[:60]!r}) contains no rows: give a path, a Hub id, a list of prompts "
            "or of rows, a datasets.Dataset or a DataFrame."
        )
    if not isinstance(data, Sequence) or not data or not all(isinstance(item, str | os.PathLike) for item in data):
        return [data]
    strange = [item for item in data if not _names_a_source(item)]
    if len(strange) == len(data):
        return [data]  # prompts
    if strange:
        raise ValueError(
            f"{str(strange[0])[:80]!r} is not a file, a folder or a Hub id, but other entries of the list are: give a list of "
            f"sources ({KINDS}) or a list of prompts."
        )
    return list(data)


def _names_a_source(item: str | os.PathLike) -> bool:
    try:
        return os.path.exists(item) or _is_row_file(Path(item)) or _HUB_ID.fullmatch(str(item)) is not None
    except ValueError:  # a text with a null byte
        return False


def _name(source: Any) -> str:
    return f"{source}" if isinstance(source, str | os.PathLike) else f"the given {type(source).__name__}"


def _is_table(data: Any) -> bool:
    """Whether this is a DataFrame, of pandas or polars."""
    return hasattr(data, "columns") and (hasattr(data, "notna") or hasattr(data, "to_dicts"))


def _rows_of(data: Any, split: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a Python object."""
    if _is_table(data):  # pandas has NaN where a cell is empty
        is_pandas = hasattr(data, "notna")
        data = data.astype(object).where(data.notna(), None).to_dict("records") if is_pandas else data.to_dicts()
    elif isinstance(data, Mapping):
        if any(isinstance(value, str) for value in data.values()):
            raise ValueError(f"the data are one row, {str(dict(data))[:60]!r}: give a list of rows.")
        data = _chosen_split(data, split, "the given data set")
    for number, row in enumerate(data):
        yield f"row {number}", row


def _chosen_split(found: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(map(str, found))} (--split).")
    return found[split]


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Reading Parquet needs pyarrow: pip install 'coral-hf[train]'.") from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a {KINDS} file.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(str(path), rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a Parquet file ({_first_line(error)}). Fetch or write it again."
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading data sets needs datasets: pip install 'coral-hf[train]'.") from error
    return datasets


def _saved(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    found = _datasets().load_from_disk(str(folder))
    return _chosen_split(found, split, str(folder)) if isinstance(found, dict) else found


def _from_hub(name: str, split: str, streaming: bool) -> Iterable[dict[str, Any]]:
    datasets = _datasets()
    parts: Any = _HUB_ID.fullmatch(name)
    try:
        return datasets.load_dataset(
            parts["id"], parts["config"], revision=parts["revision"], split=split, streaming=streaming
        )
    # OSError: not found, not reachable, HF_HUB_OFFLINE; ValueError: no such split or config; DatasetsError: its files
    # cannot be read as one data set
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name} is not a file or folder here, and could not be loaded as a data set from the Hub, split {split!r} "
            f"({_first_line(error)}). Give a {KINDS} file, a folder of them, or "
            "org/name[@revision][:config] (with --split); offline, data sets load from the local cache only."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


__all__ = ["Reading", "RowStream", "given_rows", "iter_source", "read_rows"]
