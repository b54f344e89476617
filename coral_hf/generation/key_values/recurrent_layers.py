"""Finds the recurrent parts of a target: cache layers with states of fixed size, and the modules that write them."""

import inspect
from collections.abc import Iterator
from functools import cache as remembered
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ...drafter.few_rows import is_compiled


LINEAR_TYPES = {"conv", "hybrid", "hybrid_sliding", "linear_attention"}  # layer types with states, from configs
UPDATES = {"update_conv_state", "update_recurrent_state"}  # cache methods with which a module writes its states


def is_linear(layer: Any) -> bool:
    """Whether a cache layer keeps states of fixed size, with or without keys and values."""
    return "LinearAttention" in type(layer).__name__


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer keeps a state after a forward pass that Transformers cannot crop.

    Pure convolutions can be cropped. They keep their last inputs, and also earlier ones while they record their past.
    """
    return is_linear(layer) and any(state is not None for state in layer.recurrent_states.values())


def crop(layer: Any, count: int) -> None:
    """Removes the last `count` tokens from a layer's states per token. Recurrent states stay unchanged."""
    if not is_linear(layer) or (layer.record_past and not is_recurrent(layer)):
        layer.crop(-count)
    elif isinstance(layer, DynamicLayer):  # attention next to the recurrence, as in Falcon-H1
        kinds = (kind for kind in type(layer).__mro__ if issubclass(kind, DynamicLayer))
        attention: Any = next(kind for kind in kinds if "LinearAttention" not in kind.__name__)
        attention.crop(layer, -count)
    if is_linear(layer):
        fit_convolutions(layer)


def fit_convolutions(layer: Any) -> None:
    """Trims a layer's last inputs to the width of its kernel, with zeros before a shorter text."""
    for index, inputs in layer.conv_states.items():
        if inputs is None:
            continue
        width = layer.conv_kernel_size[index]
        if inputs.shape[-1] < width:
            inputs = nn.functional.pad(inputs, (width - inputs.shape[-1], 0))
        layer.conv_states[index] = inputs[..., -width:]


def recurrent_modules(target: PreTrainedModel) -> dict[int, list[nn.Module]]:
    """The modules that write the states of each layer, by the index of the layer."""
    found: dict[int, list[nn.Module]] = {}
    for module in target.modules():
        kind: Any = type(module)
        if isinstance(index := getattr(module, "layer_idx", None), int) and _writes_states(kind):
            found.setdefault(index, []).append(module)
    return found


@remembered
def _writes_states(kind: Any) -> bool:
    """Decided by the names in the code of its methods, including methods wrapped by decorators."""
    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    methods = [value for base in own for value in vars(base).values() if inspect.isfunction(value)]
    return any(UPDATES & set(_names(inspect.unwrap(method).__code__)) for method in methods)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def check_recurrence(target: PreTrainedModel, cache: Cache, branches: bool) -> None:
    """Raises `ValueError` for a target whose recurrent layers cannot read drafts level by level.

    Args:
        target (`PreTrainedModel`)
        cache (`Cache`): as `generate` prepared it.
        branches (`bool`): drafts are trees. For a chain, layers that can be cropped need no check.
    """
    name = type(target).__name__
    layers = [index for index, layer in enumerate(cache.layers) if is_linear(layer)]
    stateful = getattr(target, "_is_stateful", False)
    if stateful and not cache.layers:
        raise ValueError(
            f"The cache was made without the config of {name}, whose recurrent layers keep their states in it. Pass "
            "DynamicCache(config=target.config)."
        )
    modules = recurrent_modules(target) if stateful or branches else {}
    attends = any(isinstance(layer, DynamicLayer) for layer in cache.layers)
    if stateful and not (modules and attends):
        problem = "no attention layer" if modules else "states outside of its KV cache"
        raise ValueError(
            f"{name} has {problem}: rejected drafts cannot be dropped from it. Generate without assistant_model."
        )
    if not layers or not (stateful or branches):
        return
    if any(is_compiled(module) for module in target.modules()):
        raise ValueError(
            f"{name} is compiled, and its recurrent layers read the levels of a draft one by one. Generate with the uncompiled "
            "target, or without assistant_model."
        )
    for index in layers:
        writers = modules.get(index, [])
        if len(writers) == 1 and "forward" not in vars(writers[0]):
            continue
        kinds = [type(module).__name__ for module in writers]
        found = f"a {kinds[0]} whose forward is wrapped" if len(kinds) == 1 else f"{len(kinds)} modules: {kinds}"
        remedy = "Generate without assistant_model" if stateful else "Set draft_top_k=1 to verify chains"
        raise ValueError(
            f"The states of layer {index} of {name} are written by {found}. One module must write them, on its own device and "
            f"with its own code. {remedy}."
        )


__all__ = [
    "LINEAR_TYPES",
    "UPDATES",
    "check_recurrence",
    "crop",
    "fit_convolutions",
    "is_linear",
    "is_recurrent",
    "recurrent_modules",
]
