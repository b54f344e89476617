"""Methods that compile: their settings for `generate`, and their time of compiling, separate from generating."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import CompileConfig

from ..data.prompts import Prompt, encode_first_turn


# Plain `generate` with a static cache and a compiled forward pass: the alternative without a drafter on a GPU.
COMPILED_SETTINGS = {"cache_implementation": "static"}
# Most repetitions of an answer for which something was compiled. Lengths and draft sizes may be new each time.
_ATTEMPTS = 5
_LATER_TURN = 64  # assumed number of tokens that a chat template adds to a turn


def compiles(settings: dict[str, Any]) -> bool:
    """Whether a method with these settings compiles anything."""
    return bool(settings.get("draft_compile")) or settings.get("cache_implementation") == "static"


def compile_settings(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Additional settings in the generation config for a method that compiles; empty for others.

    Args:
        settings (`dict`): the method's settings.
        device (`str`): the target's device type.
    """
    if settings.get("draft_compile") or not compiles(settings):
        return {}
    config = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
    config._compile_all_devices = True  # on a CPU too
    return {"compile_config": config}


def longest_text(tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, limit: int | None = None) -> int:
    """The greatest possible length of a conversation in tokens, at most `limit`. Later turns are estimated.

    Args:
        tokenizer, prompts (`list[Prompt]`), max_new_tokens (`int`): the run's.
        limit (`int`, *optional*): the target's number of positions.
    """
    lengths = []
    for prompt in prompts:
        first = encode_first_turn(tokenizer, prompt).shape[1]
        later = sum(len(tokenizer(turn)["input_ids"]) + _LATER_TURN for turn in prompt.turns[1:])
        lengths.append(first + later + max(len(prompt.turns), 1) * max_new_tokens)
    return min(max(lengths), limit or max(lengths))


def timed_apart(answer: Callable[[], tuple[Any, float]]) -> tuple[Any, float, float]:
    """Runs `answer`, which returns a result and its seconds, until it compiles nothing.

    Returns:
        `tuple`: the last result and its seconds, and the additional seconds of the other runs.
    """
    slow: list[float] = []
    for _ in range(_ATTEMPTS):
        before = _graphs()
        found, seconds = answer()
        if _graphs() == before:
            break
        slow.append(seconds)
    return found, seconds, sum(max(other - seconds, 0.0) for other in slow)


def _graphs() -> int:
    """The number of graphs that PyTorch has compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]


__all__ = ["COMPILED_SETTINGS", "compile_settings", "compiles", "longest_text", "timed_apart"]
