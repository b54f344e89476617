"""Rows held out for evaluation: whole conversations, the same in every run and for any order of the files."""

import itertools
from typing import Any

from .row_reader import conversation_key
from .sources import RowStream


DEFAULT_ROWS = 64
DEFAULT_SHARE = 10  # by default, at most one of this many rows is held out
STREAM_ROWS = 10_000  # held-out rows of a stream are chosen among this many


def hold_out(rows: Any, count: int | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Splits rows into rows to train on and rows to evaluate on.

    All rows of an id stay together: turns of one conversation, or answers to one prompt from several files. A hash decides
    which ids are held out, because the order of a file is not random (`regenerate` writes short answers first). Rows without
    ids are identified by their prompts.

    Args:
        rows (`Iterable[dict]`): training rows, or a [`RowStream`], from whose first 10,000 rows the held-out ones are chosen.
        count (`int`, *optional*): rows to hold out, at most; by default 64, or a tenth of the rows if that is less.

    Returns:
        `tuple`: the rows to train on (again a [`RowStream`] if `rows` is one), and the held-out rows.

    Raises:
        ValueError: if `count` is negative, leaves nothing to train on, or is less than every conversation's rows.
    """
    if count is not None and count < 0:
        raise ValueError(f"eval_rows={count} must be 0 or more.")
    if count == 0:
        return rows, []
    known = list(itertools.islice(rows, STREAM_ROWS)) if isinstance(rows, RowStream) else list(rows)
    if count is not None and count >= len(known):
        raise ValueError(f"eval_rows={count}: there are {len(known)} rows; leave some to train on.")
    most = min(DEFAULT_ROWS, len(known) // DEFAULT_SHARE) if count is None else count
    keys = [conversation_key(row) for row in known]
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    chosen: set[str] = set()
    left = most
    for key in sorted(sizes):
        if sizes[key] <= left and len(chosen) + 1 < len(sizes):
            chosen.add(key)
            left -= sizes[key]
    if count is not None and not chosen:
        raise ValueError(
            f"eval_rows={count}: every conversation has too many rows to be held out and leave another one to train on. "
            "Name rows to evaluate on instead, or leave eval_rows at 0."
        )
    held_out = [row for row, key in zip(known, keys, strict=True) if key in chosen]
    if isinstance(rows, RowStream):
        return rows.without(chosen, conversation_key), held_out
    return [row for row, key in zip(known, keys, strict=True) if key not in chosen], held_out


def told(train_rows: Any, held_out: list[dict[str, Any]]) -> str:
    """One line about the rows that were held out."""
    ids = len({conversation_key(row) for row in held_out})
    rest = "" if isinstance(train_rows, RowStream) else f" of {len(train_rows) + len(held_out):,}"
    plural = "" if ids == 1 else "s"
    return f"Holding out {len(held_out)}{rest} rows ({ids} conversation{plural}) for evaluation."


__all__ = ["hold_out", "told"]
