"""Every refusal of a call, with the calls that its message tells a user to make instead.

A case is a function that makes the refused call and, by the words of the message that ask for it, each call that follows a
remedy. It is registered under words of the source of the refusal that it is about. What `monkeypatch` changes lasts until
the remedies are tried.

    @refusal("draft_top_k=0 must be")
    def no_branches(monkeypatch):
        call = Call(make_target(), size={"draft_top_k": 0})
        return call, {"set draft_top_k=1": call.but(size=CHAIN)}
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import isfunction
from typing import Any

import torch
from helpers.oracle import oracle
from helpers.parity import TREES, config_of, prompt_of
from helpers.tiny_models import make_drafter


TREE = TREES["tree16"]
OWN = object()  # a drafter made for the call's target
REFUSALS: dict[str, tuple[str, Callable]] = {}


def refusal(words: str) -> Callable:
    """Registers a case under words of the refusal's source: literal ones, between two values that it fills in."""

    def register(case: Callable) -> Callable:
        REFUSALS[case.__name__] = words, case
        return case

    return register


@dataclass(frozen=True)
class Call:
    """One call of `generate`, which compares what it returns with what plain `generate` does.

    Args:
        target (`PreTrainedModel`)
        drafter (`Any`): [`OWN`], a drafter, whatever a user takes for one, or None for a call without.
        size (`dict`): settings of the draft.
        settings (`dict`): of the generation config.
        inputs (`dict`): other arguments of `generate`; a value that is a function is called for every generation.
        drafted_only (`dict`): arguments that plain `generate` is not given.
    """

    target: Any
    drafter: Any = OWN
    ids: torch.Tensor = field(default_factory=lambda: prompt_of(12))
    size: dict = field(default_factory=lambda: dict(TREE))
    settings: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    drafted_only: dict = field(default_factory=dict)

    def but(self, **changes: Any) -> "Call":
        """The same call, changed as a message says."""
        return replace(self, **changes)

    def plain(self) -> "Call":
        return self.but(drafter=None)

    @cached_property
    def _drafter(self) -> Any:
        return make_drafter(self.target) if self.drafter is OWN else self.drafter

    def _generate(self, size: dict, **extra: Any) -> torch.Tensor:
        settings = {"max_new_tokens": 12, **self.settings}
        inputs = {name: value() if isfunction(value) else value for name, value in {**self.inputs, **extra}.items()}
        output = self.target.generate(input_ids=self.ids, generation_config=config_of(size, **settings), **inputs)
        return getattr(output, "sequences", output)

    def __call__(self) -> None:
        if self.drafter is None:
            assert self._generate({}).shape[1] > self.ids.shape[1]
            return
        # first, as users meet it: a refusal comes before any other forward
        drafted = self._generate(self.size, assistant_model=self._drafter, **self.drafted_only)
        expected = self._generate({})
        assert torch.equal(drafted, expected)
        with oracle(expected):
            drafted = self._generate(self.size, assistant_model=self._drafter, **self.drafted_only)
        assert torch.equal(drafted, expected) and self._drafter.last_stats.n_accepted > 0
