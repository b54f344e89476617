"""Prompts: a row as everything that answers or measures it reads it (turns, or chat messages), and files of them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..utils.jsonl import read_jsonl
from .chat import ASSISTANT, build_messages, check_messages, check_system, check_template_kwargs, encode_messages


_ANSWERABLE = {"system", "user", ASSISTANT}


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer.

    Args:
        id (`str`), benchmark (`str`)
        turns (`tuple[str, ...]`): user turns.
        system (`str`, *optional*): the text that stands before them.
        template_kwargs (`dict`): of the chat template, the row's `chat_template_kwargs`.
        ids (`tuple[int, ...]`, *optional*): the first turn as the target reads it, where it was encoded before.
    """

    id: str
    benchmark: str
    turns: tuple[str, ...]
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] | None = None


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


def read_prompts(paths: Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """Reads JSONL files of `{"id", "turns", "benchmark"}` rows, the first `limit` of each.

    Rows may have a `system` text, and chat `messages` in the place of turns, as those of `coral-hf regenerate`.

    Raises:
        ValueError: on a missing or empty file, a malformed line (with its number), or a benchmark named "all".
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    prompts: list[Prompt] = []
    for path in paths:
        count = 0
        for number, row in read_jsonl(path):
            row = read_prompt_row(row, f"{path}, line {number}")
            name = str(row.get("benchmark") or Path(path).name.split(".")[0])
            if name == "all":
                raise ValueError(
                    f'{path}, line {number}: "all" is what records call the sum over benchmarks; give the row another '
                    '"benchmark", or the file another name.'
                )
            given = number if row.get("id") is None else row["id"]
            kwargs = check_template_kwargs(row.get("chat_template_kwargs"), str(path))
            prompts.append(Prompt(str(given), name, tuple(row["turns"]), row.get("system"), kwargs))
            count += 1
            if count == limit:
                break
        if not count:
            raise ValueError(
                f'{path} holds no prompts: give a file with one {{"id": ..., "turns": ["..."]}} object a line.'
            )
    return prompts


def encode_context(
    tokenizer: Any,
    turns: Sequence[str],
    responses: Sequence[str] = (),
    system: str | None = None,
    where: str = "prompt",
    template_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Ids `[1, L]` of a conversation whose last user turn is to be answered."""
    messages = build_messages(turns, responses, system)
    return torch.tensor([encode_messages(tokenizer, messages, where, template_kwargs)])


def encode_first_turn(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Ids `[1, L]` of a prompt's first turn, which is to be answered."""
    if prompt.ids is not None:
        return torch.tensor([prompt.ids])
    where = f"prompt {prompt.id!r}"
    return encode_context(tokenizer, prompt.turns[:1], (), prompt.system, where, prompt.template_kwargs)


def check_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Raises `ValueError` if there are no prompts, or the chat template refuses one: before any is answered."""
    if not prompts:
        raise ValueError("There are no prompts, so nothing to measure: read some with read_prompts([path, ...]).")
    for prompt in prompts:
        encode_first_turn(tokenizer, prompt)


def answer_turns(tokenizer: Any, prompt: Prompt, answer: Callable[[torch.Tensor], Sequence[int]]) -> None:
    """Asks for the answer to each turn of a conversation in its order.

    Args:
        tokenizer: the target's.
        prompt ([`Prompt`])
        answer (`Callable`): gets the ids `[1, L]` of the conversation so far and returns those of the response, which the
            next turn follows on.
    """
    responses: list[str] = []
    for turn in range(len(prompt.turns)):
        where, turns = f"prompt {prompt.id!r}, turn {turn + 1}", prompt.turns[: turn + 1]
        ids = encode_context(tokenizer, turns, responses, prompt.system, where, prompt.template_kwargs)
        responses.append(tokenizer.decode(answer(ids), skip_special_tokens=True))


def describe_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a record says of the prompts that it measured: their ids by benchmark, in their order."""
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(prompt.benchmark, []).append(prompt.id)
    return {"prompts": ids}


__all__ = [
    "Prompt",
    "answer_turns",
    "check_prompts",
    "describe_prompts",
    "encode_context",
    "encode_first_turn",
    "read_prompt_row",
    "read_prompts",
]
