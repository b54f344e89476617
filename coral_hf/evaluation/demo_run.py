"""The run of `coral-hf demo`: plain and CORAL generation of the same prompts, and a check of identity."""

from typing import Any

import torch

from .. import demo
from ..data.prompts import encode_context
from ..generation.statistics import DraftStats
from .environment import describe_environment
from .methods import Measurement, measure


PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
    "did Natalia sell altogether in April and May?",
    "Give me three tips for staying healthy.",
)
IDENTITY_TOKENS = 48


def run_demo(
    dtype: torch.dtype, max_new_tokens: int, prompt: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Generates with and without the shipped drafter, prints both, and checks identity in float32.

    Args:
        dtype (`torch.dtype`): of the timed runs.
        max_new_tokens (`int`): tokens per prompt.
        prompt (`str`, *optional*): one prompt instead of the built-in ones.
        device (`torch.device` or `str`, defaults to `"cpu"`): device of both models.

    Returns:
        `dict`: `acceptance_length`, `speedup`, `identical`, `plain` and `coral` with `tokens_per_second`,
        `environment`.
    """
    prompts = PROMPTS if prompt is None else (prompt,)
    target, tokenizer = demo.load_target(dtype)
    target, drafter = target.to(device), demo.load_drafter(dtype).to(device)
    contexts = [encode_context(tokenizer, [text]) for text in prompts]
    for assistant in (None, drafter):
        measure(target, contexts[0], 8, assistant)
    plain, coral = [], []
    stats = DraftStats()
    for text, ids in zip(prompts, contexts, strict=True):
        plain.append(measure(target, ids, max_new_tokens))
        coral.append(measure(target, ids, max_new_tokens, drafter))
        stats = stats.merge(coral[-1].stats)
        print(f"\n>>> {text}\n{tokenizer.decode(coral[-1].new_ids, skip_special_tokens=True)}")
        print(
            f"--- plain {plain[-1].tokens_per_second:.1f} tokens/s, CORAL {coral[-1].tokens_per_second:.1f} tokens/s, "
            f"tau {coral[-1].stats.acceptance_length:.2f}"
        )
    identical = _identical_in_float32(contexts, min(IDENTITY_TOKENS, max_new_tokens), device)
    plain_speed, coral_speed = _pooled_speed(plain), _pooled_speed(coral)
    record = {
        "acceptance_length": stats.acceptance_length,
        "speedup": coral_speed / plain_speed,
        "identical": identical,
        "plain": {"tokens_per_second": plain_speed},
        "coral": {"tokens_per_second": coral_speed},
        "max_new_tokens": max_new_tokens,
        "environment": describe_environment(target.device, dtype),
    }
    name, proven = str(dtype).removeprefix("torch."), min(IDENTITY_TOKENS, max_new_tokens)
    print(
        f"\nspeedup {record['speedup']:.2f}x in {name}, tau {stats.acceptance_length:.2f}; in float32 both outputs are "
        f"{'identical' if identical else 'DIFFERENT'} over {proven} tokens per prompt"
    )
    return record


def _pooled_speed(measurements: list[Measurement]) -> float:
    return sum(len(m.new_ids) for m in measurements) / sum(m.seconds for m in measurements)


def _identical_in_float32(contexts: list[torch.Tensor], max_new_tokens: int, device: torch.device | str) -> bool:
    """Checks identity in float32. In bf16, near-ties may make N tokens at once differ from N single steps."""
    target, drafter = demo.load_target(torch.float32)[0].to(device), demo.load_drafter(torch.float32).to(device)
    return all(
        measure(target, ids, max_new_tokens).new_ids == measure(target, ids, max_new_tokens, drafter).new_ids
        for ids in contexts
    )


__all__ = ["run_demo"]
