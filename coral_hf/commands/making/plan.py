"""What a make will take, from what was measured on this machine before it starts."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from .display import clock


# of a budget: for tuning, checking and measuring at most, and of the rest for answers
MEASURED_SHARE, ANSWERS_SHARE = 0.25, 0.4
# plain tokens that one prompt costs in tuning, checking and measuring together, about: 64 tokens, a dozen times
TOKENS_PER_PROMPT = 64 * 12
MOST_PROMPTS, FEWEST_PROMPTS = 8, 2
# of the time that is left for the benchmark, the last stage that takes long: how much of it may be filled
FILLED_SHARE = 0.85
# Steps of training that are measured beside the first, which allocates
MEASURED_STEPS = 2
ASK_ABOVE = 3600.0


@dataclass
class Plan:
    """Seconds, tokens and sizes of the stages.

    Args:
        answers_seconds, training_seconds, measuring_seconds (`float`)
        tokens (`int`): response tokens to be made.
        prompts (`int`): on which the drafter is tuned, checked and measured.
        disk, memory (`int`): bytes.
    """

    answers_seconds: float
    training_seconds: float
    measuring_seconds: float
    tokens: int
    prompts: int
    disk: int
    memory: int

    @property
    def seconds(self) -> float:
        return self.answers_seconds + self.training_seconds + self.measuring_seconds

    def lines(self) -> list[str]:
        """The plan as text."""
        stages = (
            f"answers {clock(self.answers_seconds)} ({self.tokens:,} tokens), training {clock(self.training_seconds)}, tuning, "
            f"verification and benchmark {clock(self.measuring_seconds)} ({self.prompts} prompts)"
        )
        return [
            f"Plan: {stages}.",
            f"Together about {clock(self.seconds)}, {self.disk / 2**30:.2f} GiB of disk, {self.memory / 2**30:.1f} GiB of memory.",
        ]


def prompts_within(budget: float | None, token_seconds: float) -> int:
    """On how many prompts the drafter is measured, so that it takes at most its share of a budget."""
    if budget is None:
        return MOST_PROMPTS
    fitting = int(MEASURED_SHARE * budget / (token_seconds * TOKENS_PER_PROMPT))
    return max(FEWEST_PROMPTS, min(MOST_PROMPTS, fitting))


def prompts_to_fill(left: float | None, prompt_seconds: float, planned: int, most: int) -> int:
    """On how many prompts the drafter is benchmarked: more than planned where the stages before took less than they might.

    Args:
        left (`float`, *optional*): seconds of the budget; None: no budget.
        prompt_seconds (`float`): that a prompt takes, about.
        planned (`int`), most (`int`): the fewest and the most.
    """
    if left is None or prompt_seconds <= 0:
        return planned
    return max(planned, min(most, int(FILLED_SHARE * left / prompt_seconds)))


@torch.inference_mode()
def seconds_per_token(target: Any, prompt_ids: list[int]) -> float:
    """Of plain decoding, one token at a time, after a first call."""
    ids = torch.tensor([prompt_ids], device=target.device)
    count = 8
    for _ in range(2):
        started = time.perf_counter()
        target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )
    return (time.perf_counter() - started) / count


def confirmed(plan: Plan, yes: bool) -> bool:
    """Whether a make may start: one of more than an hour is asked about on a terminal."""
    if yes or plan.seconds <= ASK_ABOVE or not sys.stdin.isatty():
        return True
    return input("Start? [y/N] (--yes answers this) ").strip().lower() in ("y", "yes")


__all__ = ["MEASURED_STEPS", "Plan", "confirmed", "prompts_to_fill", "prompts_within", "seconds_per_token"]
