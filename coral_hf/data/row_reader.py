"""Converts a row of any format to a standard row, and finds its id."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .chat import ASSISTANT, UnusableRow, check_messages
from .formats import FORMATS, Format, Row


_ID_COLUMNS = ("id", "question_id", "prompt_id", "conversation_id", "task_id")
# Columns of lists, which tables and exports store as JSON.
_LISTS = (
    *("messages", "conversations", "conversation", "turns", "responses", "history"),
    *("prompt_ids", "response_ids", "input_ids", "response_mask"),
)
_LEADING = frozenset(known.columns[0] for known in FORMATS)
_OTHERS = ("input", "output", "answer", "response", "context", "history", "system", "tools", "benchmark", "id")
# The names that columns may be renamed to.
COLUMNS = tuple(dict.fromkeys((*(column for known in FORMATS for column in known.columns), *_OTHERS)))


def read_row(row: Any, where: str, columns: Mapping[str, str] | None = None) -> tuple[Format, Row]:
    """Returns the format of a row and the standard row. A row that was read before is returned unchanged.

    Args:
        row (`dict` or `str`): a string is a prompt.
        where (`str`): its place, for errors.
        columns (`dict[str, str]`, *optional*): names of [`COLUMNS`], each with the row's own name for it.

    Raises:
        ValueError: if the row has none of the formats, or violates its format.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is {str(row)[:60]!r}, of type {type(row).__name__}, but a row is an object or a string. {_expected()}"
        )
    row = plain(row)
    if columns:
        row = _renamed(row, columns, where)
    for name in _LISTS:
        row = _parsed(row, name)
    for known in FORMATS:
        if known.matches(row):
            return known, known.read(row, where)
    if empty := [name for name in _LEADING if name in row and row[name] is None]:
        raise ValueError(f"{where}: its {empty[0]!r} is empty. Fill it, or leave the row out.")
    raise ValueError(f"{where} has an unknown format: its keys are {sorted(map(str, row))}. {_expected()}")


def has_answers(known: Format, row: Row) -> bool:
    """Whether a row of [`read_row`] contains an answer to train on."""
    if known.kind == "turns":
        return "responses" in row
    if known.kind == "messages":
        return any(isinstance(message, Mapping) and message.get("role") == ASSISTANT for message in row["messages"])
    return True


def check_answered(known: Format, row: Row, where: str) -> None:
    """Raises [`UnusableRow`] for a row without an answer to train on."""
    if not has_answers(known, row):
        raise UnusableRow(
            f"{where} contains a prompt without an answer ({known.name}), so there is nothing to train on: let the target answer "
            "it first, with `coral-hf regenerate --prompts FILE --output responses.jsonl`."
        )


def row_id(row: Row, where: str) -> tuple[str, bool]:
    """A row's id, and whether it was generated: a hash of the prompt, which all answers to one prompt share.

    Args:
        row (`dict`), where (`str`): see [`read_row`].

    Raises:
        ValueError: if the row's id is neither a string nor a number.
    """
    if (name := given_id(row, where)) is not None:
        return name, False
    return _hash([row.get("system"), asked(row, where), row.get("chat_template_kwargs")])[:16], True


def given_id(row: Row, where: str) -> str | None:
    """The id in a row."""
    for name in _ID_COLUMNS:
        if (value := row.get(name)) not in (None, ""):
            if isinstance(value, bool | list | Mapping):
                raise ValueError(
                    f'{where}: "{name}" must be a string or a number, got {str(value)[:60]!r}; fix it, or leave it out.'
                )
            return str(value)
    return None


def asked(row: Row, where: str) -> Any:
    """The prompt of a row: its turns, its messages without the answers, or its first column."""
    known, row = read_row(row, where)
    if known.kind == "messages":
        return [message for message in check_messages(row["messages"], where) if message["role"] != ASSISTANT]
    return row["turns"] if known.kind == "turns" else row[known.columns[0]]


def conversation_key(row: Row) -> str:
    """A hash that all rows of a conversation share: of the id, or of the prompt."""
    name = given_id(row, "a row")
    return _hash(asked(row, "a row") if name is None else name)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value in which tensors and arrays (from tables and data sets with a format) are lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        nested = bool(value) and (isinstance(value[0], Mapping | list | tuple) or hasattr(value[0], "tolist"))
        return [plain(part) for part in value] if nested else list(value)
    return value


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """`["prompt=query"]` -> `{"prompt": "query"}`.

    Raises:
        ValueError: for anything else, and for a name that no format has.
    """
    pairs: dict[str, str] = {}
    for text in given:
        name, _, own = text.partition("=")
        if not (name and own):
            raise ValueError(f"--columns {text!r} must be NAME=COLUMN, such as prompt=query.")
        pairs[name] = own
    check_columns(pairs)
    return pairs


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raises `ValueError` for a name that no format has."""
    for name, own in (columns or {}).items():
        if name not in COLUMNS:
            raise ValueError(f"columns {name}={own}: no format has {name!r}; the names are {', '.join(COLUMNS)}.")


def _expected() -> str:
    examples = " | ".join(known.example for known in FORMATS)
    return f"Name its columns (--columns prompt=query), or write each row as in one of these lines: {examples}"


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    for name, own in columns.items():
        if own not in row:
            raise ValueError(
                f"{where} has no column {own!r} (--columns {name}={own}); its columns are {', '.join(map(str, row))}."
            )
    # a user who names the prompt column does not mean another column that would be found first
    left_out = {*columns.values(), *(_LEADING if _LEADING & set(columns) else ())}
    kept = {name: value for name, value in row.items() if name not in left_out}
    return kept | {name: row[own] for name, own in columns.items()}


def _parsed(row: Row, name: str) -> Row:
    """A row in which a column with the JSON of a list is a list."""
    value = row.get(name)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return row
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return row
    return {**row, name: found} if isinstance(found, list) else row


__all__ = [
    "COLUMNS",
    "check_answered",
    "check_columns",
    "conversation_key",
    "has_answers",
    "parse_columns",
    "plain",
    "read_row",
    "row_id",
]
