"""Is a pair lossless? A drafter's answers against plain `generate`'s, token by token, greedy and sampled."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..generation.statistics import DraftStats
from .environment import describe_environment
from .methods import (
    EXACT_DTYPES,
    Measurement,
    Method,
    check_drafter,
    describe_drafter,
    draft_settings,
    first_difference,
    measure,
)
from .prompts import Prompt, encode_context


_CONTEXT = 8  # tokens shown on either side of a difference


@dataclass(frozen=True)
class Difference:
    """Where an answer first leaves plain `generate`'s.

    Args:
        method (`str`), prompt (`str`), temperature (`float`)
        position (`int`): index among the new tokens.
        plain_token, drafted_token (`int`, *optional*): None where that answer had ended.
        plain_text, drafted_text (`str`): the tokens around it.
    """

    method: str
    prompt: str
    temperature: float
    position: int
    plain_token: int | None
    drafted_token: int | None
    plain_text: str
    drafted_text: str

    def __str__(self) -> str:
        how = "greedy" if not self.temperature else f"temperature {self.temperature:g}"
        return (
            f"first difference: method {self.method}, {how}, prompt {self.prompt}, new token {self.position}: plain "
            f"generate {_token(self.plain_token)}, drafted {_token(self.drafted_token)}\n"
            f"  plain:   {self.plain_text!r}\n  drafted: {self.drafted_text!r}"
        )


def _token(token: int | None) -> str:
    return "had ended" if token is None else f"token {token}"


class Check:
    """What one method answered so far at one temperature."""

    def __init__(self, method: Method, temperature: float):
        self.method, self.temperature, self.n_prompts = method, temperature, 0
        self.different: list[str] = []
        self.first: Difference | None = None
        self.pooled = {"all": DraftStats()}

    def add(self, tokenizer: Any, prompt: Prompt, plain: Measurement, drafted: Measurement) -> None:
        self.n_prompts += 1
        position = first_difference(plain.new_ids, drafted.new_ids)
        if position is not None:
            self.different.append(prompt.id)
            self.first = self.first or self._difference(tokenizer, prompt, position, plain.new_ids, drafted.new_ids)
        for name in ("all", prompt.benchmark):
            self.pooled[name] = self.pooled.get(name, DraftStats()).merge(drafted.stats)

    def _difference(
        self, tokenizer: Any, prompt: Prompt, position: int, plain: list[int], drafted: list[int]
    ) -> Difference:
        near = slice(max(0, position - _CONTEXT), position + _CONTEXT + 1)
        tokens = [ids[position] if position < len(ids) else None for ids in (plain, drafted)]
        texts = [tokenizer.decode(ids[near]) for ids in (plain, drafted)]
        return Difference(
            self.method.name, prompt.id, self.temperature, position, tokens[0], tokens[1], texts[0], texts[1]
        )

    def record(self) -> dict[str, Any]:
        return {
            "n_prompts": self.n_prompts,
            "identical": self.n_prompts - len(self.different),
            "different": self.different,
            "first_difference": None if self.first is None else vars(self.first),
            "steps": {name: stats.steps for name, stats in self.pooled.items()},
            "accepted": {name: stats.n_accepted for name, stats in self.pooled.items()},
            "accepted_per_depth": self.pooled["all"].accepted_per_depth,
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
    """Answers the first turn of every prompt with plain `generate` and with every method, and compares the tokens.

    Args:
        target (`PreTrainedModel`): in float32; lower dtypes have near-ties that fall either way.
        tokenizer
        methods (`list[Method]`): with CORAL drafters.
        prompts (`list[Prompt]`): see [`read_prompts`].
        max_new_tokens (`int`): per prompt.
        temperatures (`list[float]`): sampled with the same seed, besides greedy decoding. Transformers' own loop
            (`draft_stock_loop`) draws other samples by design: it is compared greedily only.
        seed (`int`): of the samples of the first prompt, one more for each next.
        output (`str` or `Path`, *optional*): folder of one `check_NAME.json` a method, written after every prompt.

    Returns:
        `list[Check]`: one per method and temperature.

    Raises:
        ValueError: for a drafter of another target, a method without a drafter, or a negative temperature.
    """
    methods, prompts = list(methods), list(prompts)
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"The methods are named {names}: give each a name of its own.")
    for method in methods:
        if not method.is_coral:
            raise ValueError(f"Method {method.name!r} has no CORAL drafter, and verify checks drafters: leave it out.")
        check_drafter(target, tokenizer, method)
    if max_new_tokens < 1 or any(temperature < 0 for temperature in temperatures):
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1, temperatures={temperatures} at least 0."
        )
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
            "max_new_tokens": max_new_tokens,
            "environment": describe_environment(target.device, target.dtype),
            **describe_drafter(method.drafter),
        }
        for method in methods
    }
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(tqdm(prompts, desc="verify", unit="prompt")):
        ids = encode_context(tokenizer, prompt.turns[:1])
        how = {"max_new_tokens": max_new_tokens, "seed": seed + index}
        plain = {t: measure(target, ids, temperature=t, **how) for t in temperatures}
        for check in checks:
            settings = {**how, "temperature": check.temperature, **check.method.settings}
            drafted = measure(target, ids, drafter=check.method.drafter, **settings)
            check.add(tokenizer, prompt, plain[check.temperature], drafted)
        if output is not None:
            for method in methods:
                _write(Path(output), [check for check in checks if check.method is method], seed, shared[method.name])
    return checks


def _write(folder: Path, checks: list[Check], seed: int, shared: dict[str, Any]) -> None:
    """`check_NAME.json`: the greedy check, with the sampled ones in a list of their own."""
    greedy, *sampled = checks
    rows = [{"temperature": check.temperature, "seed": seed, **check.record()} for check in sampled]
    path = folder / f"check_{greedy.method.name}.json"
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({**greedy.record(), "sampled": rows, **shared}, indent=2) + "\n")
    os.replace(part, path)


def print_checks(checks: Sequence[Check], dtype: str) -> None:
    """Prints what was checked as a table, the first difference of every check that failed, and what that means."""
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
        same = f"{check.n_prompts - len(check.different)}/{check.n_prompts}"
        table.add_row(check.method.name, how, same, f"{check.pooled['all'].acceptance_length:.2f}")
    Console().print(table)
    for check in checks:
        if check.first is not None:
            print(check.first)
    different = sum(len(check.different) for check in checks)
    if different:
        answers = f"{different} of {sum(check.n_prompts for check in checks)} answers differ from plain generate's"
        exact = dtype in EXACT_DTYPES
        why = "where they must not" if exact else "where near-ties may fall either way: check in float32 (--dtype)"
        print(f"warning: {answers} in {dtype}, {why}.")


__all__ = ["Check", "Difference", "print_checks", "verify"]
