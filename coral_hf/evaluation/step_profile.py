"""Where the time of a decoding step goes: target forward, drafter layer, draft head, tree, everything else."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ..data.prompts import Prompt, describe_prompts, encode_first_turn
from ..generation.candidate_generator import CoralCandidateGenerator
from ..utils.hardware import synchronized_clock
from .environment import describe_environment, describe_methods
from .methods import Method, measure
from .step_parts import wrapped_parts


def profile_step(
    target: Any, drafter: Any, prompts: list[torch.Tensor], max_new_tokens: int, **settings: Any
) -> dict[str, float]:
    """Generates with timers around the parts of a step. The prefill and the drafter's pass over the prompt are excluded.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`])
        prompts (`list[torch.LongTensor]`): ids `[1, L]`.
        max_new_tokens (`int`): tokens per prompt.
        **settings: see [`DraftSettings`].

    Returns:
        `dict`: milliseconds per step of `target_forward`, `drafter_layer`, `draft_head`, `tree`, `other` and `step`, and
        `other_share`: the share of the step outside the target's forward pass, the drafter's layer and the draft head.
    """
    spent: dict[str, float] = defaultdict(float)
    with _timers(target, drafter, spent):
        measure(target, prompts[0], 8, drafter, **settings)  # warm-up
        spent.clear()
        steps, total = 0, 0.0
        for ids in prompts:
            measurement = measure(target, ids, max_new_tokens, drafter, **settings)
            steps += measurement.stats.steps
            total += measurement.seconds
    step = total - spent.pop("prefill")
    other = step - sum(spent.values())
    parts = {name: 1e3 * seconds / steps for name, seconds in spent.items()}
    tree = parts.get("tree", 0.0)
    result = {**parts, "other": 1e3 * other / steps, "step": 1e3 * step / steps}
    return result | {"other_share": (result["other"] + tree) / result["step"]}


def profile_methods(
    target: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    output: str | Path,
    max_new_tokens: int,
    count: int = 2,
) -> dict[str, Any]:
    """Profiles all methods with a drafter on the first `count` prompts of each benchmark. Prints it and writes `step_time.json`."""
    by_benchmark: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_benchmark[prompt.benchmark].append(prompt)
    chosen = [prompt for found in by_benchmark.values() for prompt in found[:count]]
    ids = [encode_first_turn(tokenizer, prompt) for prompt in chosen]
    methods = [method for method in methods if method.is_coral and not method.settings.get("draft_stock_loop")]
    record: dict[str, Any] = {"environment": describe_environment(target.device, target.dtype)}
    record |= {
        **describe_methods(methods),
        **describe_prompts(chosen),
        "max_new_tokens": max_new_tokens,
        "methods": {},
    }
    for method in methods:
        parts = profile_step(target, method.drafter, ids, max_new_tokens, **method.settings)
        record["methods"][method.name] = {"settings": method.settings, "milliseconds": parts}
        print(method.name, ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    (Path(output) / "step_time.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


@contextmanager
def _timers(target: Any, drafter: Any, spent: dict[str, float]) -> Iterator[None]:
    clock = partial(synchronized_clock, [target.device])
    wanted = ("target_forward", "drafter_layer", "draft_head", "tree", "draft")
    inside = drafting = drafted = False  # in a part; since the first proposal of a call; since its end
    call_start = 0.0

    def timed(function, part, *args, **kwargs):
        nonlocal inside
        start, inside = clock(), True
        try:
            return function(*args, **kwargs)
        finally:
            inside = False
            spent[part] += clock() - start

    def wrap(function, part):
        @wraps(function)  # generation reads the forward's signature
        def run(*args, **kwargs):
            nonlocal drafting, drafted
            if part == "draft":
                if not drafting:
                    spent["prefill"] += clock() - call_start
                drafting = True
                found = function(*args, **kwargs)
                drafted = True
                return found
            # time outside the parts is "other"; nested parts count once
            return timed(function, part, *args, **kwargs) if drafting and not inside else function(*args, **kwargs)

        return run

    def start_call(self, *args, **kwargs):
        nonlocal drafting, drafted, call_start
        drafting, drafted, call_start = False, False, clock()
        return original_init(self, *args, **kwargs)

    def extend(self, *args, **kwargs):
        """The first rows that a drafter reads in a call belong to the prompt."""
        if drafted:
            return original_extend(self, *args, **kwargs)
        return timed(original_extend, "prefill", self, *args, **kwargs)

    original_init, original_extend = CoralCandidateGenerator.__init__, CoralCandidateGenerator._extend
    with (
        wrapped_parts(target, drafter, wrap, wanted),
        patch.object(CoralCandidateGenerator, "__init__", start_call),
        patch.object(CoralCandidateGenerator, "_extend", extend),
    ):
        yield


__all__ = ["profile_methods", "profile_step"]
