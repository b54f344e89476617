"""The drafter's KV cache of a conversation, kept with the target's KV cache until the next turn."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ...drafter.draft_layer import DraftKeyValues
from ...drafter.head_rows import tensor_state


@dataclass
class ReadRows:
    """The drafter's KV cache for a conversation so far. Without it, the next turn would be drafted with no context.

    Args:
        ids (`torch.LongTensor` of shape `[1, L]`): the tokens in the target's cache.
        num_padding (`int`): number of padding tokens on their left.
        rows ([`DraftKeyValues`]): the drafter's KV cache.
        features (`torch.Tensor` of shape `[1, n, F]`): the target's features of the last n tokens, which `rows` lacks.
    """

    ids: torch.Tensor
    num_padding: int
    rows: DraftKeyValues
    features: torch.Tensor


# Entries disappear with the target's cache. The drafter is referenced weakly too, because it may be deleted earlier.
_kept: weakref.WeakKeyDictionary[Cache, tuple[weakref.ref, list, ReadRows]] = weakref.WeakKeyDictionary()


def _weights(drafter: Any) -> list[tuple]:
    return [tensor_state(parameter) for parameter in drafter.parameters()]


def keep_rows(cache: Cache, drafter: Any, read: ReadRows) -> None:
    """Keeps the rows for as long as the cache exists."""
    _kept[cache] = weakref.ref(drafter), _weights(drafter), read


def take_rows(cache: Cache, drafter: Any, input_ids: torch.Tensor, known: int, num_padding: int) -> ReadRows | None:
    """The drafter's rows of the first `known` tokens of `input_ids` `[1, L]`; None if the kept rows are of other tokens.

    If the caller has changed the cache since, drafts get worse, but the output stays correct.
    """
    owner, weights, read = _kept.pop(cache, (None, None, None))
    if owner is None or read is None or owner() is not drafter or weights != _weights(drafter):
        return None
    same = read.num_padding == num_padding and read.ids.shape[1] == known and read.ids.device == input_ids.device
    return read if same and torch.equal(read.ids, input_ids[:, :known]) else None


__all__ = ["ReadRows", "keep_rows", "take_rows"]
