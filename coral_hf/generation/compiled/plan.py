"""Decides, before any forward pass, whether a call is compiled, with which options and in which shapes."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.utils import logging

from ...utils.compat import cache_kwarg, cache_of, compiles_by_itself
from ..key_values.paths import store_obstacle
from ..settings import DraftSettings
from .graphs import put_back, take


logger = logging.get_logger(__name__)

# Lengths of stores. Texts of similar length share their graphs.
_SHORTEST, _LONGEST_STEP = 256, 4096
# Sizes that trees are padded to. Each is compiled when a tree first needs it.
NODE_COUNTS = (1, 8, 16, 32, 64)
# Modes in which PyTorch records CUDA graphs, which a CPU cannot run.
_CUDA_MODES = ("reduce-overhead",)


@dataclass
class GraphPlan:
    """How one call of `generate` is compiled. A context manager, which returns graphs and buffers for later calls.

    Args:
        options (`dict`): keyword arguments of `torch.compile`.
        length (`int`): slots per row in the caches.
    """

    options: dict[str, Any]
    length: int
    _taken: list[tuple] = field(default_factory=list)

    def take(self, model: torch.nn.Module, key: Hashable, partner: torch.nn.Module, make: Callable[[], Any]) -> Any:
        """See [`graphs.take`]."""
        graphs = take(model, key, partner, make)
        self._taken.append((model, key, partner, graphs))
        return graphs

    def __enter__(self) -> "GraphPlan":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:  # after an error they may be incomplete
            for taken in self._taken:
                put_back(*taken)
        self._taken.clear()


def padded_count(nodes: int) -> int:
    """The size that a tree is padded to: the next of `NODE_COUNTS`, or the next multiple of the largest."""
    largest = NODE_COUNTS[-1]
    return next((count for count in NODE_COUNTS if count >= nodes), -(-nodes // largest) * largest)


def length_of(tokens: int) -> int:
    """The length of a store for this many tokens: a power of two, or a multiple of 4,096 above that."""
    if tokens > _LONGEST_STEP:
        return -(-tokens // _LONGEST_STEP) * _LONGEST_STEP
    return max(_SHORTEST, 1 << (tokens - 1).bit_length())


def graph_plan(
    target: PreTrainedModel,
    settings: DraftSettings,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> GraphPlan | None:
    """How a call is compiled; None if it is not.

    A call is compiled if it sets `draft_compile=True`. It is also compiled if it uses a static cache
    (`cache_implementation="static"`) and plain `generate` would compile with that. A static cache in `model_kwargs` is then
    replaced by an empty dynamic one for the prefill.

    Raises:
        ValueError: if `draft_compile=True` and the static store does not support the target or the call, or if the options
            do not allow graphs of fixed shapes.
    """
    cache, config = cache_of(model_kwargs), generation_config.compile_config
    static = type(cache) is StaticCache and not getattr(cache, "_is_user_defined", False)
    by_itself = False
    if not settings.draft_compile and (static or config is not None):
        by_itself = compiles_by_itself(target, model_kwargs, generation_config)
    if not (settings.draft_compile or static) or settings.draft_stock_loop:
        return None  # the stock loop rejects a static cache
    empty = DynamicCache(config=target.config.get_text_config()) if static else cache
    mask, longest = model_kwargs.get("attention_mask"), generation_config.max_length
    returned = bool(generation_config.return_dict_in_generate)
    problem = "it keeps no KV cache" if empty is None else store_obstacle(target, empty, mask, longest, returned)
    if problem is not None:
        if settings.draft_compile:
            raise ValueError(
                f"draft_compile=True verifies in a static key-value store, which cannot serve this call of "
                f"{type(target).__name__}: {problem}. Set draft_compile=False."
            )
        return None  # `check_cache` rejects the static cache
    if static:
        model_kwargs.update(cache_kwarg(empty))
    if not (settings.draft_compile or by_itself) or settings.draft_lookup or settings.draft_head == "context":
        return None  # graphs of fixed shapes cannot take looked-up nodes or a growing list
    options = _options(target, generation_config, settings.draft_compile)
    most = padded_count(settings.draft_total_tokens)
    tokens = max(longest, generation_config.max_cache_len or 0)
    return GraphPlan(options, length_of(tokens + most))


def _options(target: PreTrainedModel, generation_config: GenerationConfig, asked: bool) -> dict[str, Any]:
    """Keyword arguments of `torch.compile`."""
    device, config = target.device.type, generation_config.compile_config
    if asked and generation_config.disable_compile:
        raise ValueError(
            "draft_compile=True, but disable_compile=True in the generation config. Remove one of the two."
        )
    if asked and (quantizer := getattr(target, "hf_quantizer", None)) is not None and not quantizer.is_compileable:
        raise ValueError(
            f"draft_compile=True, but weights quantised by {type(quantizer).__name__} cannot be compiled. Set "
            "draft_compile=False."
        )
    if config is None:
        options = {"fullgraph": True, "backend": "inductor", "mode": "reduce-overhead" if device == "cuda" else None}
    else:
        options = config.to_dict()
        if options.get("dynamic"):
            raise ValueError(
                "compile_config.dynamic=True asks for dynamic shapes, but drafts and their verification are graphs of fixed "
                "shapes. Leave dynamic out of the CompileConfig."
            )
        if options["backend"] != "inductor":
            options["mode"] = None  # inductor's own
        elif device != "cuda" and options.get("mode") in _CUDA_MODES:
            if asked:
                raise ValueError(
                    f"compile_config.mode={options['mode']!r} records CUDA graphs, but the target is on {device!r}. Pass "
                    "CompileConfig(mode='default'), or no compile_config at all."
                )
            options["mode"] = None  # as PyTorch does for plain `generate`, which it logs
    options["dynamic"] = False
    _check_backend(options["backend"], device)
    return {name: value for name, value in options.items() if value is not None}


def _check_backend(backend: Any, device: str) -> None:
    if callable(backend):
        return
    try:
        torch._dynamo.lookup_backend(backend)
    except Exception as error:
        known = ", ".join(sorted(torch._dynamo.list_backends()))
        raise ValueError(
            f"compile_config.backend={backend!r} is not a backend of this PyTorch. Choose one of {known}, or leave it out."
        ) from error
    if backend == "inductor" and device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise ValueError(
                "draft_compile on a CPU needs a C++ compiler, and PyTorch finds none: install g++, or set "
                "draft_compile=False."
            ) from error


__all__ = ["NODE_COUNTS", "GraphPlan", "graph_plan", "length_of", "padded_count"]
