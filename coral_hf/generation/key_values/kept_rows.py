"""What a drafter has read of a conversation, kept beside the target's KV cache until its next turn."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ...drafter.draft_layer import DraftKeyValues
from ...drafter.head_rows import tensor_state


@dataclass
class ReadRows:
    """A drafter's rows of a text; without them it drafts the next turn as if that were the beginning.

    Args:
        ids (`torch.LongTensor` of shape `[1, L]`): what the target's cache contains.
        num_padding (`int`): left padding among them.
        rows ([`DraftKeyValues`]): the drafter's KV cache.
        features (`torch.Tensor` of shape `[1, n, F]`): the target's, of the last n of the ids, not in `rows` yet.
    """

    ids: torch.Tensor
    num_padding: int
    rows: DraftKeyValues
    features: torch.Tensor


# They go when the target's cache does. The drafter is held weakly too: it may be gone, or have other weights by then.
_kept: weakref.WeakKeyDictionary[Cache, tuple[weakref.ref, list, ReadRows]] = weakref.WeakKeyDictionary()


def _weights(drafter: Any) -> list[tuple]:
    return [tensor_state(parameter) for parameter in drafter.parameters()]


def keep_rows(cache: Cache, drafter: Any, read: ReadRows) -> None:
    """Keeps them as long as the cache lives."""
    _kept[cache] = weakref.ref(drafter), _weights(drafter), read


def take_rows(cache: Cache, drafter: Any, input_ids: torch.Tensor, known: int, num_padding: int) -> ReadRows | None:
    """What the drafter has read of the first `known` of `input_ids` `[1, L]`, which the cache held; None if not just that.

    If the cache contains something else by now, rows of another text would make bad drafts, no other text.
    """
    owner, weights, read = _kept.pop(cache, (None, None, None))
    if owner is None or read is None or owner() is not drafter or weights != _weights(drafter):
        return None
    same = read.num_padding == num_padding and read.ids.shape[1] == known and read.ids.device == input_ids.device
    return read if same and torch.equal(read.ids, input_ids[:, :known]) else None


__all__ = ["ReadRows", "keep_rows", "take_rows"]
