"""A row of prompts, as everything that answers or measures them reads it: turns, or chat messages."""

import itertools
from typing import Any

from .chat import ASSISTANT, check_messages, check_system


_ANSWERABLE = {"system", "user", ASSISTANT}


def read_prompt_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of `turns`, or of chat `messages`, as one of turns with a `system` text where it has one.

    Of messages the user's are the turns: what the assistant said is left for the target to say. Other keys are kept.

    Args:
        row (`dict`), where (`str`): its place, for errors.

    Raises:
        ValueError: if there are no turns, or they or the system text are not strings.
    """
    if isinstance(row.get("messages"), list) and not isinstance(row.get("turns"), list):
        row = _user_turns(row, where)
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(
            f'{where}: "turns" must be a non-empty list of strings, or "messages" hold those of a user; got '
            f"{str(turns)[:60]!r}."
        )
    check_system(row, where)
    return row


def _user_turns(row: dict[str, Any], where: str) -> dict[str, Any]:
    messages = check_messages(row["messages"], where)
    if unknown := sorted({message["role"] for message in messages} - _ANSWERABLE):
        raise ValueError(
            f"{where}: messages of role {', '.join(unknown)} cannot be answered again; leave the row out."
        )
    row = {key: value for key, value in row.items() if key != "messages"}
    row["turns"] = [message["content"] for message in messages if message["role"] == "user"]
    leading = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    if any(message["role"] == "system" for message in messages[len(leading) :]):
        raise ValueError(
            f"{where}: a system message stands behind others, where a row of turns cannot hold it; put it in front, or leave "
            "the row out."
        )
    if leading and row.get("system") is not None:
        raise ValueError(f"{where} has a system text beside a system message; keep one of them.")
    if leading:
        row["system"] = "\n\n".join(message["content"] for message in leading)
    return row


__all__ = ["read_prompt_row"]
