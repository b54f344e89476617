"""The plan of a make: time, disk and memory, estimated from measurements on this machine before it starts."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from .display import clock


# shares: at most this part of a budget for tuning, checking and measuring, and this part of the rest for answers
MEASURED_SHARE, ANSWERS_SHARE = 0.25, 0.4
# cost of one prompt in tuning, checking and measuring, in plain tokens: about 64 tokens, a dozen times
TOKENS_PER_PROMPT = 64 * 12
MOST_PROMPTS, FEWEST_PROMPTS = 8, 2
# share of the remaining time that the benchmark, the last long stage, may use
FILLED_SHARE = 0.85
# Measured training steps, after the first, which allocates memory
MEASURED_STEPS = 2
ASK_ABOVE = 3600.0


@dataclass
class Plan:
    """Seconds, tokens and sizes of the stages.

    Args:
        answers_seconds, training_seconds, measuring_seconds (`float`)
        tokens (`int`): response tokens to generate.
        prompts (`int`): number of prompts for tuning, checking and measuring.
        disk, memory (`int`): in bytes.
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
    """The number of prompts for measuring the drafter, so that it takes at most its share of a budget."""
    if budget is None:
        return MOST_PROMPTS
    fitting = int(MEASURED_SHARE * budget / (token_seconds * TOKENS_PER_PROMPT))
    return max(FEWEST_PROMPTS, min(MOST_PROMPTS, fitting))


def prompts_to_fill(left: float | None, prompt_seconds: float, planned: int, most: int) -> int:
    """The number of prompts of the benchmark: more than planned if the earlier stages took less time than they could.

    Args:
        left (`float`, *optional*): seconds left of the budget; None: no budget.
        prompt_seconds (`float`): the estimated time of a prompt.
        planned (`int`), most (`int`): the minimum and the maximum.
    """
    if left is None or prompt_seconds <= 0:
        return planned
    return max(planned, min(most, int(FILLED_SHARE * left / prompt_seconds)))


@torch.inference_mode()
def seconds_per_token(target: Any, prompt_ids: list[int]) -> float:
    """Speed of plain decoding, one token at a time, after a first call."""
    ids = torch.tensor([prompt_ids], device=target.device)
    count = 8
    for _ in range(2):
        started = time.perf_counter()
        target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )
    return (time.perf_counter() - started) / count


def confirmed(plan: Plan, yes: bool) -> bool:
    """Whether a make may start. Asks on a terminal if it takes more than an hour."""
    if yes or plan.seconds <= ASK_ABOVE or not sys.stdin.isatty():
        return True
    return input("Start? [y/N] (--yes answers this) ").strip().lower() in ("y", "yes")


__all__ = ["MEASURED_STEPS", "Plan", "confirmed", "prompts_to_fill", "prompts_within", "seconds_per_token"]
