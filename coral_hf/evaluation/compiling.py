"""Methods that compile: what `generate` is told for them, and the time of compiling apart from that of generating."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import CompileConfig

from ..data.prompts import Prompt, encode_first_turn


# Plain `generate` with a static cache, its forward compiled: what a GPU's user has without a drafter.
COMPILED_SETTINGS = {"cache_implementation": "static"}
# An answer is given again as long as something was compiled for it, so many times at most: lengths and draft sizes may be new.
_ATTEMPTS = 5
_LATER_TURN = 64  # tokens that a chat template is taken to add to a turn


def compiles(settings: dict[str, Any]) -> bool:
    """Whether a method with these settings compiles anything."""
    return bool(settings.get("draft_compile")) or settings.get("cache_implementation") == "static"


def compile_settings(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """What a method that compiles sets in the generation config besides; nothing for others.

    Args:
        settings (`dict`): of the method.
        device (`str`): type of the target's.
    """
    if settings.get("draft_compile") or not compiles(settings):
        return {}
    config = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
    config._compile_all_devices = True  # on a CPU too
    return {"compile_config": config}


def longest_text(tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, limit: int | None = None) -> int:
    """Tokens that the longest conversation can come to, `limit` at most; later turns are estimated.

    Args:
        tokenizer, prompts (`list[Prompt]`), max_new_tokens (`int`): of the run.
        limit (`int`, *optional*): positions of the target.
    """
    lengths = []
    for prompt in prompts:
        first = encode_first_turn(tokenizer, prompt).shape[1]
        later = sum(len(tokenizer(turn)["input_ids"]) + _LATER_TURN for turn in prompt.turns[1:])
        lengths.append(first + later + max(len(prompt.turns), 1) * max_new_tokens)
    return min(max(lengths), limit or max(lengths))


def timed_apart(answer: Callable[[], tuple[Any, float]]) -> tuple[Any, float, float]:
    """Runs `answer`, which returns something and its seconds, until nothing is compiled for it.

    Returns:
        `tuple`: what it returned and its seconds, the last time; and the seconds that the other times took longer.
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
    """Graphs that PyTorch has compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]


__all__ = ["COMPILED_SETTINGS", "compile_settings", "compiles", "longest_text", "timed_apart"]
