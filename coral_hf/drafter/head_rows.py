"""Rows of a target's LM head: groups that a router chooses, ids that a text contains, and stored copies of rows."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_coral import group_count, group_size
from .few_rows import few_row_linear


T = TypeVar("T")

# Per router or list of ids, per head of a target, both held weakly: the state of the tensors that a copy was made of, and it.
_copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

FEWEST_ROWS = 256  # that a list of a text's ids makes room for at a time


class LMHeadRouter(nn.Module):
    """Chooses the groups of token ids to compute (CORAL section 3.2).

    Group g contains the ids at places `g * group_size` on of the router's order: the ids themselves (a group is then a view
    of the target's own weight), or, clustered, the permutation `token_order`, for which drafting keeps one copy of the
    head in that order. It is trained after the drafter towards the target's probability mass per group.

    Args:
        hidden_size (`int`): H, width of the drafter's output.
        vocab_size (`int`): V; the last group is shorter where V does not divide evenly.
        num_groups (`int`): G, lowered to the number of groups that hold an id (see `group_count`).
        router_hidden_size (`int`): width of the MLP.
        clustered (`bool`): has a `token_order`, see `training.token_clusters`.
    """

    token_order: torch.Tensor | None

    def __init__(
        self, hidden_size: int, vocab_size: int, num_groups: int, router_hidden_size: int, clustered: bool = False
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.num_groups = group_count(vocab_size, num_groups)
        self.group_size = group_size(vocab_size, num_groups)
        self.up_proj = nn.Linear(hidden_size, router_hidden_size, bias=True)
        self.down_proj = nn.Linear(router_hidden_size, self.num_groups, bias=True)
        self.register_buffer("token_order", torch.arange(vocab_size, dtype=torch.int32) if clustered else None)

    @classmethod
    def from_config(cls, config: Any) -> "LMHeadRouter":
        """The untrained router that a [`CoralDraftConfig`] describes."""
        sizes = config.hidden_size, config.vocab_size, config.router_groups, config.router_hidden_size
        return cls(*sizes, clustered=config.router_grouping == "clustered")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drafter outputs `[..., H]` -> group logits `[..., G]`."""
        return self.down_proj(F.silu(self.up_proj(hidden.to(self.up_proj.weight.dtype))))

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """Values per id `[..., V]` -> values per place of a group `[..., G, group_size]`, 0 past the vocabulary."""
        if self.token_order is not None:
            values = values[..., self.token_order.long()]
        padding = self.num_groups * self.group_size - self.vocab_size
        return F.pad(values, (0, padding)).unflatten(-1, (self.num_groups, self.group_size))

    def group_mass(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Token probabilities `[..., V]` -> probability mass per group `[..., G]`."""
        return self.in_order(probabilities).sum(-1)

    def groups_of(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The group of each id, in the shape of `token_ids`."""
        if self.token_order is None:
            return token_ids // self.group_size
        return self.token_order.long().argsort()[token_ids] // self.group_size


class ContextList:
    """The head's rows of the ids that a call's texts contain, in addition to those of a list.

    Text repeats its own words, so its ids are likely to occur again (MicroSpec, arXiv 2605.26444). Nothing is trained.

    Args:
        adapter ([`TargetAdapter`])
        token_ids (`torch.LongTensor` of shape `[A]`): the list, on the device of the head.

    Attributes:
        token_ids (`torch.LongTensor` of shape `[A + n]`): the list, then the n ids of the texts that are not in it.
    """

    def __init__(self, adapter: Any, token_ids: torch.Tensor):
        self.token_ids = token_ids
        self._adapter, self._known = adapter, set(token_ids.tolist())
        self._weight: torch.Tensor | None = None  # rows `[n, H]`, with space for more
        self._bias: torch.Tensor | None = None
        self._count = 0

    def add(self, token_ids: torch.Tensor) -> None:
        """Adds ids of any shape; waits for their device."""
        new = [
            token
            for token in dict.fromkeys(token_ids.flatten().tolist())
            if token not in self._known and 0 <= token < self._adapter.vocab_size
        ]
        if not new:
            return
        self._known.update(new)
        ids = torch.tensor(new, device=self.token_ids.device)
        self.token_ids = torch.cat([self.token_ids, ids])
        weight, bias = self._adapter.head_rows(ids)
        self._weight = _appended(self._weight, weight, self._count)
        self._bias = None if bias is None else _appended(self._bias, bias, self._count)
        self._count += len(new)

    def logits(self, features: torch.Tensor) -> torch.Tensor | None:
        """Untransformed logits `[..., n]` of features `[..., H]` in the head's dtype and on its device; None if n is 0."""
        if self._weight is None:
            return None
        bias = None if self._bias is None else self._bias[: self._count]
        return few_row_linear(features, self._weight[: self._count], bias)


def _appended(rows: torch.Tensor | None, new: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` of the rows and the new ones after them; a larger copy where they do not fit."""
    end = count + len(new)
    if rows is None or end > len(rows):
        grown = new.new_empty(max(FEWEST_ROWS, 2 * end), *new.shape[1:])
        if rows is not None:
            grown[:count] = rows[:count]
        rows = grown
    rows[count:end] = new
    return rows


def ordered_head(adapter: Any, router: Any) -> Any:
    """The head for `grouped_logits`: the adapter itself, or for a clustered router its head in the router's order.

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
    """The result of `make` for a head's rows, computed once for an owner of ids and a head, and again if either changes.

    Args:
        owner (`nn.Module`): the module that owns the ids.
        ids (`torch.Tensor`): the selected rows.
        head (`nn.Module`): a module with `weight` and optionally `bias`.
        make (`Callable`): a function whose result must not reference owner or head.
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
    """A value that changes if a tensor is written to or replaced (except for writes to inference tensors)."""
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


__all__ = [
    "ContextList",
    "LMHeadRouter",
    "gathered_logits",
    "grouped_logits",
    "kept_copy",
    "ordered_head",
    "tensor_state",
]
