"""The attention of a target while it verifies drafts, and only then, registered with Transformers' `AttentionInterface`."""

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
# From this many places on, a CPU is faster at products than at sdpa with a mask (measured in float32, one thread).
_LONG = 1000
# Of the thread that verifies: whether all nodes see all of the prefix, by layer.
_here = threading.local()
_lock = threading.Lock()
# By the implementation that is replaced: the threads that verify at this moment, and the function that it is otherwise.
_users: Counter[str] = Counter()
_own: dict[str, Callable] = {}


def replaces_attention(target: PreTrainedModel) -> bool:
    """Whether [`verifying`] changes anything for this target.

    Not for eager attention; not for FlashAttention with a soft-cap or sinks, which nothing here computes; not for what is
    compiled.
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
    """Within it this thread's forwards attend as a draft tree needs it; other threads' attend as before.

    Args:
        target (`PreTrainedModel`): for which [`replaces_attention`] holds; it is given masks of four dimensions that are added
            to the scores.
        whole (`Sequence[bool]`): of each layer, whether all nodes see all of the prefix that the layer contains.
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
        if torch.compiler.is_compiling():  # knows of no thread; its keys are places that a mask alone tells apart
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
        # what changes the scores in another way is left to sdpa
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
    """The fastest of the forms that are exact here, `[B, N, heads, d]`; None: sdpa with repeated heads."""
    nodes = query.shape[2]
    if query.device.type == "cpu":
        # sums of half precision would be rounded at every step
        if sees_all and key.shape[2] >= _LONG and query.dtype not in HALF:
            return softmax_attention(query, key, value, mask[..., -nodes:], scaling)
        return masked_attention(query, key, value, mask, scaling)
    # kernels without a mask exist for half precision only, and for one size of heads
    if sees_all and query.dtype in HALF and key.shape[-1] == value.shape[-1] <= 256 and query.device.type == "cuda":
        return joined_attention(query, key, value, mask[..., -nodes:], scaling)
    return None


__all__ = ["replaces_attention", "verifying"]
