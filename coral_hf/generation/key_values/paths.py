"""Decides which cache contains the target's keys and values during verification. No other module decides this.

The store ([`KeyValueStore`]) serves batches, regeneration and single sequences. Calls that it does not support stay in
Transformers' dynamic cache, one sequence at a time. `docs/batches.md` lists both tables; a test compares them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..attention.verifying import replaces_attention


LAYERS_IN_STORE = ("full_attention", "sliding_attention")


def layer_kinds(target: PreTrainedModel) -> list[str]:
    """The layer type of each layer of the target."""
    config = target.config.get_text_config()
    # Without layer_types, a window applies to all layers (Mistral).
    default = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(getattr(config, "layer_types", None) or [default] * config.num_hidden_layers)


def layer_windows(target: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer of the target, None if it has none."""
    window = getattr(target.config.get_text_config(), "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in layer_kinds(target)]


def rope_limits(config: Any) -> list[tuple[int, bool]]:
    """Lengths at which the RoPE frequencies change, and whether they are constant afterwards (longrope: True)."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        if kind.get("rope_type") == "dynamic":
            limits.append((config.max_position_embeddings, False))
        elif kind.get("rope_type") == "longrope":
            limits.append((kind["original_max_position_embeddings"], True))
    return limits


def takes_tree_masks(target: PreTrainedModel) -> bool:
    """Whether the target's attention, or its replacement during verification, supports tree masks."""
    if target.config.get_text_config()._attn_implementation in ("sdpa", "eager"):
        return True
    return replaces_attention(target)


def tree_obstacle(target: PreTrainedModel) -> str | None:
    """Why this target's attention does not use the positions of a tree's nodes; None if it does."""
    config = target.config.get_text_config()
    # the signature of the class, because wrappers of an instance's forward (hooks, timers) may hide it
    if "position_ids" not in inspect.signature(type(target).forward).parameters:
        return "takes no position_ids"
    if getattr(config, "alibi", False):
        return "computes distances from indices, not from positions (alibi=True)"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "does not expose the windows of its local layers (attention_layers)"
    return None


def _encoder_decoder(target: PreTrainedModel) -> str | None:
    return f"it is an encoder-decoder ({target.config.model_type})" if target.config.is_encoder_decoder else None


def _attention(target: PreTrainedModel) -> str | None:
    attention = target.config.get_text_config()._attn_implementation
    if takes_tree_masks(target):
        return None
    return f'attn_implementation={attention!r} takes no mask per row (load it with attn_implementation="sdpa")'


def _other_layers(target: PreTrainedModel) -> str | None:
    unknown = sorted(set(layer_kinds(target)) - set(LAYERS_IN_STORE))
    return f"it has layers of type {', '.join(unknown)}" if unknown else None


def _shared_layers(target: PreTrainedModel) -> str | None:
    shared = getattr(target.config.get_text_config(), "num_kv_shared_layers", None)
    return f"its last {shared} layers read the keys of earlier layers (num_kv_shared_layers)" if shared else None


def _cross_attention(target: PreTrainedModel) -> str | None:
    layers = getattr(target.config.get_text_config(), "cross_attention_layers", None)
    return f"its layers {layers} attend to something other than the text" if layers else None


def _several_positions(target: PreTrainedModel) -> str | None:
    rope = getattr(target.config.get_text_config(), "rope_parameters", None) or {}
    return "its tokens have several positions each (mrope_section)" if "mrope_section" in rope else None


def _several_devices(target: PreTrainedModel) -> str | None:
    devices = {str(device) for device in (getattr(target, "hf_device_map", None) or {}).values()}
    return f"it is on several devices ({', '.join(sorted(devices))})" if len(devices) > 1 else None


# Properties of targets that the store does not support, as the docs list them -> a function that finds them in a target.
OF_TARGETS: dict[str, Callable[[PreTrainedModel], str | None]] = {
    "their own encoder (encoder-decoders)": _encoder_decoder,
    "attention other than `sdpa`, `eager` and FlashAttention without soft-cap or sinks": _attention,
    "layers other than full and sliding attention (recurrent, convolutional, chunked)": _other_layers,
    "layers that read the keys of others (Gemma 4 and 3n)": _shared_layers,
    "layers that attend to something other than the text (Llama 3.2 Vision)": _cross_attention,
    "several positions per token (Qwen-VL)": _several_positions,
    "positions that do not reach the attention (MPT, BLOOM, ALiBi, GPT-Neo's local layers)": tree_obstacle,
    "a `device_map` over several devices": _several_devices,
}


def _given_cache(
    target: PreTrainedModel, cache: Cache, mask: torch.Tensor | None, max_length: int, returned: bool
) -> str | None:
    if getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0:
        return "the call passes its own KV cache"
    return None


def _other_cache(
    target: PreTrainedModel, cache: Cache, mask: torch.Tensor | None, max_length: int, returned: bool
) -> str | None:
    kinds = {type(layer).__name__ for layer in cache.layers}
    plain = {layer.__name__ for layer in (DynamicLayer, DynamicSlidingWindowLayer)}
    whole = not cache.layers or len(cache.layers) == len(layer_kinds(target))
    if type(cache) is DynamicCache and kinds <= plain and not cache.offloading and whole:
        return None
    return f"its cache is {type(cache).__name__} of {', '.join(sorted(kinds)) or 'no layers'}"


def _holes(
    target: PreTrainedModel, cache: Cache, mask: torch.Tensor | None, max_length: int, returned: bool
) -> str | None:
    if mask is None or (mask.ndim == 2 and not bool((mask[:, 1:] < mask[:, :-1]).any()) and bool(mask[:, -1].all())):
        return None
    return "its attention mask has zeros that are not left padding"


def _changing_rope(
    target: PreTrainedModel, cache: Cache, mask: torch.Tensor | None, max_length: int, returned: bool
) -> str | None:
    limits = [limit for limit, _ in rope_limits(target.config.get_text_config()) if limit < max_length]
    return f"RoPE changes its frequencies at {limits[0]} of {max_length} tokens" if limits else None


def _returned_padding(
    target: PreTrainedModel, cache: Cache, mask: torch.Tensor | None, max_length: int, returned: bool
) -> str | None:
    if returned and mask is not None and mask.shape[0] == 1 and not bool(mask.all()):
        return "its cache is returned with padding, but the store keeps no padding"
    return None


# The same for properties of a call.
OF_CALLS: dict[str, Callable[[PreTrainedModel, Cache, torch.Tensor | None, int, bool], str | None]] = {
    "a KV cache that the caller passes": _given_cache,
    "other caches (offloaded, quantised, static)": _other_cache,
    "attention masks with holes or padding on the right": _holes,
    "texts that reach a length where RoPE changes (longrope, dynamic)": _changing_rope,
    "a single padded sequence with `return_dict_in_generate`, whose cache is returned": _returned_padding,
}


def target_obstacle(target: PreTrainedModel) -> str | None:
    """Why the store does not support this target in any call; None if it does."""
    found = (obstacle(target) for obstacle in OF_TARGETS.values())
    return next((problem for problem in found if problem is not None), None)


def store_obstacle(
    target: PreTrainedModel, cache: Cache, mask: torch.Tensor | None, max_length: int, returned: bool = False
) -> str | None:
    """Why a call of `generate` must stay in the dynamic cache, one sequence at a time; None if it can use the store.

    Args:
        target (`PreTrainedModel`)
        cache (`Cache`): as `generate` prepared it, before the prefill.
        mask (`torch.Tensor` of shape `[B, L]`, *optional*): the prompts' attention mask.
        max_length (`int`): the longest sequence that the call can reach.
        returned (`bool`): whether the caller gets the cache back.
    """
    if (problem := target_obstacle(target)) is not None:
        return problem
    found = (obstacle(target, cache, mask, max_length, returned) for obstacle in OF_CALLS.values())
    return next((problem for problem in found if problem is not None), None)


__all__ = [
    "OF_CALLS",
    "OF_TARGETS",
    "layer_kinds",
    "layer_windows",
    "rope_limits",
    "store_obstacle",
    "takes_tree_masks",
    "target_obstacle",
    "tree_obstacle",
]
