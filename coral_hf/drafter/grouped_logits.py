"""A target's LM head by groups of rows: the logits of the groups that a router chose, and the head in a router's order."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from .few_rows import few_row_linear


T = TypeVar("T")

# Per router or list of ids, per head of a target, both held weakly: the state of the tensors that a copy was made of, and it.
_copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def ordered_head(adapter: Any, router: Any) -> Any:
    """What `grouped_logits` reads: the adapter itself, or for a clustered router its head in the router's order.

    Args:
        adapter ([`TargetAdapter`])
        router ([`LMHeadRouter`])

    Raises:
        ValueError: if the router's `token_order` is not a permutation of the vocabulary, or the head is quantised.
    """
    adapter.check_rows()
    if router.token_order is None:
        return adapter

    def copy_rows() -> tuple[torch.Tensor, torch.Tensor | None]:
        ids = router.token_order.to(adapter.device).long()
        if not torch.equal(ids.sort().values, torch.arange(adapter.vocab_size, device=ids.device)):
            raise ValueError(
                f"The router's token_order is not a permutation of the {adapter.vocab_size} ids: its checkpoint is damaged. "
                "Train the router again (`coral-hf train --stage router`), or use draft_head='full'."
            )
        return adapter.head_rows(ids)

    return _OrderedHead(adapter, *kept_copy(router, router.token_order, adapter.head, copy_rows))


def kept_copy(owner: Any, ids: torch.Tensor, head: Any, make: Callable[[], T]) -> T:
    """What `make` makes of a head's rows: made once for an owner of ids and a head, again when either has changed.

    Args:
        owner (`nn.Module`): whose ids they are.
        ids (`torch.Tensor`): the rows that are taken.
        head (`nn.Module`): with `weight` and perhaps `bias`.
        make (`Callable`): may contain neither owner nor head in what it returns.
    """
    tensors = (head.weight, getattr(head, "bias", None), ids)
    state: list[Any] = [None if tensor is None else tensor_state(tensor) for tensor in tensors]
    # `merge_adapter()` writes to `weight.data`, which moves no version: some rows tell
    state.append(tuple(head.weight.detach()[:: max(1, len(head.weight) // 16)].float().sum(dim=1).tolist()))
    by_head = _copies.setdefault(owner, weakref.WeakKeyDictionary())
    kept = by_head.get(head)
    if kept is None or kept[0] != state:
        kept = by_head[head] = (state, make())
    return kept[1]


def tensor_state(tensor: torch.Tensor) -> tuple:
    """What changes when a tensor is written to or replaced (except for writes to inference tensors)."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


class _OrderedHead:
    """A permuted copy of a target's head in the shape of its adapter."""

    def __init__(self, adapter: Any, weight: torch.Tensor, bias: torch.Tensor | None):
        self.head, self.head_dtype, self.vocab_size = (
            SimpleNamespace(weight=weight, bias=bias),
            weight.dtype,
            len(weight),
        )
        self.transform_logits = adapter.transform_logits

    def head_rows(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.head.weight[places], None if self.head.bias is None else self.head.bias[places]


def grouped_logits(adapter: Any, hidden: torch.Tensor, groups: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of the rows in the given groups of `size` consecutive rows.

    On a CPU one matmul per distinct group on a view of the head, nothing gathered; elsewhere, and in a graph,
    `gathered_logits`, which never waits for the device.

    Args:
        adapter ([`TargetAdapter`], or what `ordered_head` returns)
        hidden (`torch.Tensor` of shape `[B, T, H]`).
        groups (`torch.LongTensor` of shape `[B, T, k]` or, shared by the T, `[B, 1, k]`).
        size (`int`): ids per group.

    Returns:
        `torch.Tensor` of shape `[B, T, k, size]`, -inf past the end of the vocabulary.
    """
    if groups.device.type != "cpu" or torch.compiler.is_compiling():
        return gathered_logits(adapter, hidden, groups, size)
    if hidden.shape[0] > 1:
        pairs = zip(hidden.split(1), groups.split(1), strict=True)
        return torch.cat([grouped_logits(adapter, *pair, size) for pair in pairs])
    rows, shared = hidden.shape[1], groups.shape[1] == 1
    features = hidden.to(adapter.head_dtype)
    if shared or rows == 1:
        parts = [_group_logits(adapter, features, group, size) for group in groups[0, 0].tolist()]
        return _without_padding(adapter, torch.stack(parts, dim=2), groups)
    logits = features.new_empty(1, rows, groups.shape[2], size)
    users: dict[int, list[tuple[int, int]]] = {}
    for row, row_groups in enumerate(groups[0].tolist()):
        for place, group in enumerate(row_groups):
            users.setdefault(group, []).append((row, place))
    for group, places in users.items():
        user_rows, user_places = (list(column) for column in zip(*places, strict=True))
        logits[0, user_rows, user_places] = _group_logits(adapter, features[0, user_rows], group, size)
    return _without_padding(adapter, logits, groups)


def _group_logits(adapter: Any, features: torch.Tensor, group: int, size: int) -> torch.Tensor:
    """Untransformed logits `[..., size]` of one group, through a view of the head."""
    ids = slice(group * size, min((group + 1) * size, adapter.vocab_size))
    bias = getattr(adapter.head, "bias", None)
    logits = few_row_linear(features, adapter.head.weight[ids], None if bias is None else bias[ids])
    return F.pad(logits, (0, size - logits.shape[-1])) if logits.shape[-1] < size else logits


def _without_padding(adapter: Any, logits: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Transforms `[1, T, k, size]` logits, then marks what lies past the vocabulary: soft-capping would lift a -inf."""
    logits, size = adapter.transform_logits(logits), logits.shape[-1]
    last = (adapter.vocab_size - 1) // size
    width = adapter.vocab_size - last * size
    if width < size:
        padding = torch.arange(size, device=logits.device) >= width
        logits = logits.masked_fill((groups == last)[..., None] & padding, float("-inf"))
    return logits


def gathered_logits(adapter: Any, hidden: torch.Tensor, groups: torch.Tensor, size: int) -> torch.Tensor:
    """`grouped_logits` by gathering the head's rows: slower on a CPU, static shapes and no host sync on a GPU."""
    ids = groups[..., None] * size + torch.arange(size, device=groups.device)  # [1, T or 1, k, size]
    weight, bias = adapter.head_rows(ids.clamp(max=adapter.vocab_size - 1))
    features = hidden.to(weight)
    logits = torch.einsum("bth,btksh->btks", features, weight.expand(-1, hidden.shape[1], -1, -1, -1))
    if bias is not None:
        logits = logits + bias
    return adapter.transform_logits(logits).masked_fill(ids >= adapter.vocab_size, float("-inf"))


__all__ = ["gathered_logits", "grouped_logits", "kept_copy", "ordered_head"]
