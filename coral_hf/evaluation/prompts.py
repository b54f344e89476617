"""Prompt files of benchmarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..chat import build_messages, render, tokenize
from ..jsonl import read_jsonl


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer.

    Args:
        id (`str`), benchmark (`str`)
        turns (`tuple[str, ...]`): user turns.
    """

    id: str
    benchmark: str
    turns: tuple[str, ...]


def read_prompts(paths: Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """Reads JSONL files of `{"id", "turns", "benchmark"}` rows, the first `limit` of each.

    Raises:
        ValueError: on a missing or empty file, or a malformed line (with its number).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    prompts: list[Prompt] = []
    for path in paths:
        count = 0
        for number, row in read_jsonl(path):
            turns = row.get("turns")
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
                raise ValueError(f'{path}, line {number}: "turns" must be a non-empty list of strings.')
            name = str(row.get("benchmark") or Path(path).name.split(".")[0])
            prompts.append(Prompt(str(row.get("id", number)), name, tuple(turns)))
            count += 1
            if count == limit:
                break
        if not count:
            raise ValueError(
                f'{path} holds no prompts: give a file with one {{"id": ..., "turns": ["..."]}} object a line.'
            )
    return prompts


def encode_context(tokenizer: Any, turns: Sequence[str], responses: Sequence[str] = ()) -> torch.Tensor:
    """Ids `[1, L]` of a conversation whose last user turn is to be answered."""
    text = render(tokenizer, build_messages(turns, responses), "prompt", add_generation_prompt=True)
    return torch.tensor([tokenize(tokenizer, text)])


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
        ids = encode_context(tokenizer, prompt.turns[: turn + 1], responses)
        responses.append(tokenizer.decode(answer(ids), skip_special_tokens=True))


__all__ = ["Prompt", "answer_turns", "encode_context", "read_prompts"]
