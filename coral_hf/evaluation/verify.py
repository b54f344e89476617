"""Checks that a pair is lossless: compares a drafter's answers with plain `generate`'s, token by token."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.prompts import Prompt, answer_turns, check_prompts, describe_prompts
from ..generation.statistics import DraftStats
from ..utils.whole_files import write_json
from .environment import describe_drafter, describe_environment, describe_rendering, describe_target
from .methods import (
    EXACT_DTYPES,
    Measurement,
    Method,
    check_drafter,
    check_temperatures,
    draft_settings,
    first_difference,
    measure,
)


_CONTEXT = 8  # tokens shown on either side of a difference


@dataclass(frozen=True)
class Difference:
    """The first difference between an answer and plain `generate`'s.

    Args:
        method (`str`), prompt (`str`), temperature (`float`)
        turn (`int`): turn of the conversation, from 1.
        position (`int`): index among the new tokens.
        plain_token, drafted_token (`int`, *optional*): None if that answer had ended.
        plain_text, drafted_text (`str`): the tokens around it.
    """

    method: str
    prompt: str
    temperature: float
    turn: int
    position: int
    plain_token: int | None
    drafted_token: int | None
    plain_text: str
    drafted_text: str

    def __str__(self) -> str:
        how = "greedy" if not self.temperature else f"temperature {self.temperature:g}"
        return (
            f"first difference: method {self.method}, {how}, prompt {_place(self.prompt, self.turn)}, new token "
            f"{self.position}: plain generate {_token(self.plain_token)}, drafted {_token(self.drafted_token)}\n"
            f"  plain:   {self.plain_text!r}\n  drafted: {self.drafted_text!r}"
        )


def _place(prompt: str, turn: int) -> str:
    """Names a prompt's turn. The first turn has only the prompt's id."""
    return prompt if turn == 1 else f"{prompt}, turn {turn}"


def _token(token: int | None) -> str:
    return "had ended" if token is None else f"token {token}"


class Check:
    """The results of one method at one temperature so far."""

    def __init__(self, method: Method, temperature: float):
        self.method, self.temperature = method, temperature
        self.n_prompts = self.n_turns = 0
        self.different: list[str] = []
        self.first: Difference | None = None
        self.pooled = {"all": DraftStats()}

    def add(self, tokenizer: Any, prompt: Prompt, turn: int, plain: Measurement, drafted: Measurement) -> None:
        self.n_prompts += turn == 1
        self.n_turns += 1
        position = first_difference(plain.new_ids, drafted.new_ids)
        if position is not None:
            self.different.append(_place(prompt.id, turn))
            if self.first is None:
                self.first = self._difference(tokenizer, prompt, turn, position, plain.new_ids, drafted.new_ids)
        for name in ("all", prompt.benchmark):
            self.pooled[name] = self.pooled.get(name, DraftStats()).merge(drafted.stats)

    def _difference(
        self, tokenizer: Any, prompt: Prompt, turn: int, position: int, plain: list[int], drafted: list[int]
    ) -> Difference:
        near = slice(max(0, position - _CONTEXT), position + _CONTEXT + 1)
        plain_token, drafted_token = (ids[position] if position < len(ids) else None for ids in (plain, drafted))
        plain_text, drafted_text = (tokenizer.decode(ids[near]) for ids in (plain, drafted))
        return Difference(
            method=self.method.name,
            prompt=prompt.id,
            temperature=self.temperature,
            turn=turn,
            position=position,
            plain_token=plain_token,
            drafted_token=drafted_token,
            plain_text=plain_text,
            drafted_text=drafted_text,
        )

    def record(self) -> dict[str, Any]:
        return {
            "n_prompts": self.n_prompts,
            "n_turns": self.n_turns,
            "identical": self.n_turns - len(self.different),
            "different": self.different,
            "first_difference": None if self.first is None else vars(self.first),
            "steps": {name: stats.steps for name, stats in self.pooled.items()},
            "accepted": {name: stats.n_accepted for name, stats in self.pooled.items()},
            "accepted_per_depth": self.pooled["all"].accepted_per_depth,
            "reached_per_depth": self.pooled["all"].reached_per_depth,
            "acceptance_length": {name: round(stats.acceptance_length, 4) for name, stats in self.pooled.items()},
            "acceptance_per_depth": [round(rate, 4) for rate in self.pooled["all"].acceptance_per_depth],
        }


def verify(
    target: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    temperatures: Sequence[float] = (),
    seed: int = 0,
    output: str | Path | None = None,
) -> list[Check]:
    """Answers every turn of every prompt with plain `generate` and with every method, and compares the tokens.

    Later turns continue plain `generate`'s answers, as in a benchmark.

    Args:
        target (`PreTrainedModel`): a target in float32. In lower precision, near-ties may differ.
        tokenizer
        methods (`list[Method]`): methods with CORAL drafters.
        prompts (`list[Prompt]`): see [`read_prompts`].
        max_new_tokens (`int`): tokens per turn.
        temperatures (`list[float]`): temperatures for sampling with the same seed, in addition to greedy decoding.
            Transformers' own loop (`draft_stock_loop`) draws other samples by design and is only compared greedily.
        seed (`int`): seed of the first prompt's samples. Each further prompt adds one.
        output (`str` or `Path`, *optional*): folder for one `check_NAME.json` per method, written after every prompt. Of
            `n_turns` answers to `n_prompts` conversations, `identical` are equal to plain `generate`'s, and `different`
            names the others.

    Returns:
        `list[Check]`: one per method and temperature.

    Raises:
        ValueError: for a drafter of another target, a method without a drafter, a negative or non-finite temperature, or
            if there are no prompts.
    """
    methods, prompts = list(methods), list(prompts)
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"The methods are named {names}: give each a name of its own.")
    for method in methods:
        if not method.is_coral:
            raise ValueError(f"Method {method.name!r} has no CORAL drafter, but verify checks drafters: leave it out.")
        check_drafter(target, tokenizer, method)
    check_prompts(tokenizer, prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    check_temperatures(temperatures)
    temperatures = list(dict.fromkeys([0.0, *temperatures]))
    checks = [
        Check(method, temperature)
        for method in methods
        for temperature in temperatures
        if not temperature or method.samples_like_plain
    ]
    shared = {
        method.name: {
            "settings": draft_settings(method),
            "environment": describe_environment(target.device, target.dtype),
            **describe_run(target, tokenizer, method, prompts, max_new_tokens),
        }
        for method in methods
    }
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(tqdm(prompts, desc="verify", unit="prompt")):
        for temperature in dict.fromkeys(check.temperature for check in checks):
            here = [check for check in checks if check.temperature == temperature]
            how = {"max_new_tokens": max_new_tokens, "seed": seed + index, "temperature": temperature}
            turns = itertools.count(1)
            answer_turns(tokenizer, prompt, partial(_compare, target, tokenizer, here, prompt, turns, how))
        if output is not None:
            for method in methods:
                _write(Path(output), [check for check in checks if check.method is method], seed, shared[method.name])
    return checks


def describe_run(
    target: Any, tokenizer: Any, method: Method, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, Any]:
    """The record's description of a check. Arguments are those of [`verify`]."""
    return {
        "max_new_tokens": max_new_tokens,
        **describe_target(target),
        **describe_rendering(tokenizer),
        **describe_drafter(method.drafter),
        **describe_prompts(prompts),
    }


def check_file(folder: Path, method: Method) -> Path:
    """The path of a method's check."""
    return folder / f"check_{method.name}.json"


def _compare(
    target: Any,
    tokenizer: Any,
    checks: list[Check],
    prompt: Prompt,
    turns: Iterator[int],
    how: dict[str, Any],
    ids: torch.Tensor,
) -> list[int]:
    """Adds every method's answer to its check. Returns plain `generate`'s answer."""
    turn = next(turns)
    plain = measure(target, ids, **how)
    for check in checks:
        drafted = measure(target, ids, drafter=check.method.drafter, **how, **check.method.settings)
        check.add(tokenizer, prompt, turn, plain, drafted)
    return plain.new_ids


def _write(folder: Path, checks: list[Check], seed: int, shared: dict[str, Any]) -> None:
    """Writes `check_NAME.json`: the greedy check, with the sampled ones in a separate list."""
    greedy, *sampled = checks
    rows = [{"temperature": check.temperature, "seed": seed, **check.record()} for check in sampled]
    write_json(check_file(folder, greedy.method), {**greedy.record(), "sampled": rows, **shared})


def print_checks(checks: Sequence[Check], dtype: str) -> None:
    """Prints a table of the checks, the first difference of every failed check, and an explanation."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The table needs rich: pip install 'coral-hf[eval]'.") from error
    table = Table(title="same tokens as plain generate")
    for column in ("method", "decoding", "identical", "tau"):
        table.add_column(column, justify="left" if column in ("method", "decoding") else "right")
    for check in checks:
        how = "greedy" if not check.temperature else f"sampled, temperature {check.temperature:g}"
        same = f"{check.n_turns - len(check.different)}/{check.n_turns}"
        table.add_row(check.method.name, how, same, f"{check.pooled['all'].acceptance_length:.2f}")
    Console().print(table)
    for check in checks:
        if check.first is not None:
            print(check.first)
        if not check.n_turns:
            print(f"error: method {check.method.name} at temperature {check.temperature:g} was compared with nothing.")
    different = sum(len(check.different) for check in checks)
    if different:
        answers = f"{different} of {sum(check.n_turns for check in checks)} answers differ from plain generate's"
        exact = dtype in EXACT_DTYPES
        why = "which must not happen" if exact else "where near-ties may differ: check in float32 (--dtype)"
        print(f"warning: {answers} in {dtype}, {why}.")


__all__ = ["Check", "Difference", "check_file", "describe_run", "print_checks", "verify"]
