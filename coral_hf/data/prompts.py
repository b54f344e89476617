"""Prompts for answering and measuring: conversion of rows to turns or chat messages, and files of prompts."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .chat import ASSISTANT, build_messages, check_messages, check_system, check_template_kwargs, encode_messages
from .formats import Format
from .row_reader import row_id
from .sources import Reading


_ANSWERABLE = {"system", "user", ASSISTANT}


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer.

    Args:
        id (`str`), benchmark (`str`)
        turns (`tuple[str, ...]`): user turns.
        system (`str`, *optional*): the system text before the turns.
        template_kwargs (`dict`): the row's `chat_template_kwargs`, for the chat template.
        ids (`tuple[int, ...]`, *optional*): the encoded first turn, if it is known.
    """

    id: str
    benchmark: str
    turns: tuple[str, ...]
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] | None = None


def as_prompt(known: Format, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Converts a row of [`read_row`] to a row of turns, with its `system` text if it has one.

    The turns are the user's messages. The assistant's messages are dropped, because the target answers itself. Other keys are
    kept.

    Args:
        known ([`Format`]), row (`dict`): the result of [`read_row`].
        where (`str`): its place, for errors.

    Raises:
        ValueError: if it contains no text, no user turn, or a system text that is not a string.
    """
    if known.kind in ("ids", "masked"):
        raise ValueError(
            f'{where} contains {known.name}, which are not answered again: give prompts, such as {{"prompt": "Hi!"}}.'
        )
    if known.kind == "messages":
        row = _user_turns(row, where)
    elif known.kind == "text":
        row = {**{name: value for name, value in row.items() if name != "text"}, "turns": [row["text"]]}
    check_system(row, where)
    check_template_kwargs(row.get("chat_template_kwargs"), f"{where}: chat_template_kwargs")
    return row


def _user_turns(row: dict[str, Any], where: str) -> dict[str, Any]:
    messages = check_messages(row["messages"], where)
    if unknown := sorted({message["role"] for message in messages} - _ANSWERABLE):
        raise ValueError(
            f"{where}: messages of role {', '.join(unknown)} cannot be answered again; leave the row out."
        )
    row = {key: value for key, value in row.items() if key != "messages"}
    row["turns"] = [message["content"] for message in messages if message["role"] == "user"]
    if not row["turns"]:
        raise ValueError(f"{where}: no message is a user's, so there is nothing to answer; leave the row out.")
    leading = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    if any(message["role"] == "system" for message in messages[len(leading) :]):
        raise ValueError(
            f"{where}: a system message comes after others, which a row of turns cannot represent; move it to the front, or "
            "leave the row out."
        )
    if leading and row.get("system") is not None:
        raise ValueError(f"{where} has both a system text and a system message; keep one of them.")
    if leading:
        row["system"] = "\n\n".join(message["content"] for message in leading)
    return row


def read_prompts(
    data: Any, limit: int | None = None, split: str = "train", columns: Mapping[str, str] | None = None
) -> list[Prompt]:
    """Reads prompts for measuring, in any format of docs/data_formats.md: the first `limit` of each source.

    By default, a row's `benchmark` is the name of its file, and its id is a hash of its texts.

    Args:
        data, split (`str`), columns (`dict[str, str]`, *optional*): see [`Reading`].
        limit (`int`, *optional*)

    Raises:
        ValueError: on a missing or empty source, a malformed line (with its number), or a benchmark named "all".
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    reading = Reading(data, split, columns=columns)
    prompts: list[Prompt] = []
    for source in reading.sources:
        default = Path(source).name.split(".")[0] if isinstance(source, str | os.PathLike) else "given"
        rows = list(itertools.islice(reading.rows_of(source), limit))
        for where, known, found in rows:
            row = as_prompt(known, found, where)
            name = str(row.get("benchmark") or default)
            if name == "all":
                raise ValueError(
                    f'{where}: records use "all" for the sum over benchmarks; give the row another '
                    '"benchmark", or the file another name.'
                )
            kwargs = check_template_kwargs(row.get("chat_template_kwargs"), where)
            prompts.append(Prompt(row_id(found, where)[0], name, tuple(row["turns"]), row.get("system"), kwargs))
        if not rows:
            raise ValueError(f'{source} contains no prompts: give a file with rows such as {{"prompt": "Hi!"}}.')
    print(reading.told(), flush=True)
    return prompts


def encode_context(
    tokenizer: Any,
    turns: Sequence[str],
    responses: Sequence[str] = (),
    system: str | None = None,
    where: str = "prompt",
    template_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Ids `[1, L]` of a conversation, up to the answer to its last user turn."""
    messages = build_messages(turns, responses, system)
    return torch.tensor([encode_messages(tokenizer, messages, where, template_kwargs)])


def encode_first_turn(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Ids `[1, L]` of a prompt's first turn, up to its answer."""
    if prompt.ids is not None:
        return torch.tensor([prompt.ids])
    where = f"prompt {prompt.id!r}"
    return encode_context(tokenizer, prompt.turns[:1], (), prompt.system, where, prompt.template_kwargs)


def check_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Raises `ValueError`, before any prompt is answered, if there are none or the chat template rejects one."""
    if not prompts:
        raise ValueError("There are no prompts to measure: read some with read_prompts([path, ...]).")
    for prompt in prompts:
        encode_first_turn(tokenizer, prompt)


def answer_turns(tokenizer: Any, prompt: Prompt, answer: Callable[[torch.Tensor], Sequence[int]]) -> None:
    """Answers the turns of a conversation in order.

    Args:
        tokenizer: the target's.
        prompt ([`Prompt`])
        answer (`Callable`): receives the ids `[1, L]` of the conversation so far and returns those of the response. The
            next turn continues from there.
    """
    responses: list[str] = []
    for turn in range(len(prompt.turns)):
        where, turns = f"prompt {prompt.id!r}, turn {turn + 1}", prompt.turns[: turn + 1]
        ids = encode_context(tokenizer, turns, responses, prompt.system, where, prompt.template_kwargs)
        responses.append(tokenizer.decode(answer(ids), skip_special_tokens=True))


def describe_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The prompts of a record: their ids by benchmark, in order."""
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(prompt.benchmark, []).append(prompt.id)
    return {"prompts": ids}


__all__ = [
    "Prompt",
    "answer_turns",
    "as_prompt",
    "check_prompts",
    "describe_prompts",
    "encode_context",
    "encode_first_turn",
    "read_prompts",
]
