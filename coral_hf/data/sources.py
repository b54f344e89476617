"""Rows of files, folders and data sets: one reader for all that `datasets` and JSONL hold."""

import copy
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.jsonl import read_jsonl
from .conversations import SCHEMAS, chat_of, listed, schema_of


_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:]+))?(:(?P<config>.+))?")


def read_rows(paths: str | Path | Sequence[str | Path], split: str = "train") -> list[dict[str, Any]]:
    """Reads training rows of JSONL and Parquet files, folders and data sets, all of them.

    Args:
        paths: one source or several, see [`iter_source`]; every row must have the columns of one of [`SCHEMAS`], the
            same in all sources.
        split (`str`): of data sets with several splits.

    Raises:
        ValueError: on a missing source, a malformed line (with its number), an unknown schema or mixed schemas.
    """
    rows = list(RowStream(paths, split, streaming=False))
    if not rows:
        raise ValueError(f"{_names(paths)}: no rows to train on.")
    return rows


class RowStream:
    """Training rows read while they are used, from the start at every iteration; as [`read_rows`] otherwise.

    Args:
        paths, split: see [`read_rows`].
        streaming (`bool`): read data sets of the Hub over the network instead of fetching them first.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], split: str = "train", streaming: bool = True):
        self.paths = [paths] if isinstance(paths, str | Path) else list(paths)
        self.split, self.streaming = split, streaming
        self._left_out: Container[str] = ()
        self._key_of: Callable[[dict[str, Any]], str] | None = None

    def without(self, keys: Container[str], key_of: Callable[[dict[str, Any]], str]) -> "RowStream":
        """The same stream without the rows whose key is one of `keys`."""
        rest = copy.copy(self)
        rest._left_out, rest._key_of = keys, key_of
        return rest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        key_of = self._key_of
        return (row for row in self._rows() if key_of is None or key_of(row) not in self._left_out)

    def _rows(self) -> Iterator[dict[str, Any]]:
        first: tuple[str, str] | None = None
        for path in self.paths:
            for where, row in iter_source(path, self.split, self.streaming):
                schema, row = schema_of(row, where), listed(row)
                first = first or (schema, where)
                if schema in ("messages", "text"):
                    chat_of(row, schema, where)  # here the line is known
                if schema != first[0]:
                    raise ValueError(
                        f"{where} has the columns of schema {schema!r}, but {first[1]} has those of {first[0]!r}. "
                        f"Train on files of one schema: {SCHEMAS}."
                    )
                yield row


def iter_source(
    path: str | os.PathLike, split: str = "train", streaming: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) of a source.

    Args:
        path: a JSONL (`.jsonl`, `.jsonl.gz`) or Parquet file, a folder of Parquet shards, a folder of `save_to_disk`, or a
            data set on the Hub: `org/name`, `org/name@revision`, `org/name:config`.
        split (`str`): of data sets with several splits.
        streaming (`bool`): read data sets of the Hub while they are used instead of fetching them first.

    Raises:
        ValueError: if there is no such source, or it is not what its name says.
    """
    place = Path(path)
    if place.is_dir() and any((place / name).is_file() for name in _SAVED):
        yield from _numbered(f"{path}", _saved(place, split))
    elif place.is_dir():
        shards = sorted(place.glob("*.parquet"))
        if not shards:
            raise ValueError(f"{path} holds no .parquet shards, nor a data set of save_to_disk.")
        for shard in shards:
            yield from _read_parquet(shard)
    elif place.suffix == ".parquet":
        yield from _read_parquet(place)
    elif not place.exists() and place.suffix not in (".jsonl", ".gz", ".json") and _HUB_ID.fullmatch(str(path)):
        yield from _numbered(f"{path}, split {split}", _from_hub(str(path), split, streaming))
    else:
        for number, row in read_jsonl(place):
            yield f"{path}, line {number}", row


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
        raise ValueError(f"{path} does not exist; give a .jsonl, .jsonl.gz or .parquet file.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(str(path), rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no Parquet file ({_first_line(error)}). Fetch or write it again."
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading data sets needs datasets: pip install 'coral-hf[train]'.") from error
    return datasets


def _saved(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    found = _datasets().load_from_disk(str(folder))
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"{folder} has no split {split!r}; its splits are {', '.join(found)} (--split).")
        found = found[split]
    return found


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
            f"{name} is no file or folder here and could not be loaded as a data set of the Hub, split {split!r} "
            f"({_first_line(error)}). Give a .jsonl, .jsonl.gz or .parquet file, a folder of shards, or "
            "org/name[@revision][:config] (with --split); offline, data sets load from the local cache only."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _names(paths: Any) -> str:
    return str(paths) if isinstance(paths, str | Path) else ", ".join(map(str, paths))


__all__ = ["RowStream", "iter_source", "read_rows"]
