"""The target's attention during verification, registered with Transformers' `AttentionInterface`."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...drafter.few_rows import is_compiled
from .grouped import HALF, joined_attention, masked_attention, softmax_attention


_OTHER_SCORES = ("softcap", "s_aux", "position_bias")
# From this many places on, products are faster on a CPU than sdpa with a mask (measured in float32, one thread).
_LONG = 1000
# For the verifying thread: whether all nodes see the whole prefix, by layer.
_here = threading.local()
_lock = threading.Lock()
# For each replaced implementation: the threads that are verifying, and the original function.
_users: Counter[str] = Counter()
_own: dict[str, Callable] = {}


def replaces_attention(target: PreTrainedModel) -> bool:
    """Whether [`verifying`] changes anything for this target.

    It does not for eager attention, for FlashAttention with a soft-cap or sinks (not supported here), or for compiled
    forwards.
    """
    config = target.config.get_text_config()
    name = str(config._attn_implementation)
    if name not in ALL_ATTENTION_FUNCTIONS or any(is_compiled(module) for module in target.modules()):
        return False
    if name == "sdpa":
        return True
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "flash" in name and not capped and not any(hasattr(module, "sinks") for module in target.modules())


@contextmanager
def verifying(target: PreTrainedModel, whole: Sequence[bool]) -> Iterator[None]:
    """Context in which this thread's forward passes attend as a draft tree needs. Other threads are not affected.

    Args:
        target (`PreTrainedModel`): a target with [`replaces_attention`]. It must be called with additive masks of four
            dimensions.
        whole (`Sequence[bool]`): for each layer, whether all nodes see the whole prefix in the layer.
    """
    name = target.config.get_text_config()._attn_implementation
    with _lock:
        _users[name] += 1
        if _users[name] == 1:
            _own[name] = ALL_ATTENTION_FUNCTIONS[name]
            AttentionInterface.register(name, _replacement(_own[name]))
    _here.whole = whole
    try:
        yield
    finally:
        _here.whole = None
        with _lock:
            _users[name] -= 1
            if not _users[name]:
                AttentionInterface.register(name, _own.pop(name))


@cache
def _replacement(own: Callable) -> Callable:
    @wraps(own)
    def attend(module, query, key, value, attention_mask, *args, **kwargs):
        if torch.compiler.is_compiling():  # independent of threads; only its mask tells which keys count
            if attention_mask is None or attention_mask.ndim != 4:
                return own(module, query, key, value, attention_mask, *args, **kwargs)
            if query.device.type == "cpu" and _plain(args, kwargs):
                scaling = kwargs.get("scaling")
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                return masked_attention(query, key, value, attention_mask, scaling), None
            return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        whole = getattr(_here, "whole", None)
        if whole is None or attention_mask is None or attention_mask.ndim != 4:
            return own(module, query, key, value, attention_mask, *args, **kwargs)
        attended = None
        # sdpa handles other changes of the scores
        if _plain(args, kwargs):
            layer, scaling = getattr(module, "layer_idx", None), kwargs.get("scaling")
            sees_all = layer is not None and layer < len(whole) and whole[layer]
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            attended = _attend(query, key, value, attention_mask, scaling, sees_all)
        if attended is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        return attended, None

    return attend


def _plain(args: tuple, kwargs: dict) -> bool:
    """Whether scores are scaled products and nothing else."""
    return not args and not kwargs.get("dropout") and all(kwargs.get(name) is None for name in _OTHER_SCORES)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float, sees_all: bool
) -> torch.Tensor | None:
    """The fastest form that is exact here, `[B, N, heads, d]`; None: use sdpa with repeated heads."""
    nodes = query.shape[2]
    if query.device.type == "cpu":
        # sums of half precision would be rounded at every step
        if sees_all and key.shape[2] >= _LONG and query.dtype not in HALF:
            return softmax_attention(query, key, value, mask[..., -nodes:], scaling)
        return masked_attention(query, key, value, mask, scaling)
    # kernels without a mask only exist for half precision and equal head sizes
    if sees_all and query.dtype in HALF and key.shape[-1] == value.shape[-1] <= 256 and query.device.type == "cuda":
        return joined_attention(query, key, value, mask[..., -nodes:], scaling)
    return None


__all__ = ["replaces_attention", "verifying"]
