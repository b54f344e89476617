"""Cheap draft heads: LMHeadRouter and FrequencyShortlist choose the rows of the target's LM head that are computed.

The verification always uses the full head, so that what is chosen here changes the speed and never the output.
"""

import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_coral import group_size
from .few_rows import few_row_linear


class LMHeadRouter(nn.Module):
    """Which groups of token ids are worth computing (CORAL section 3.2).

    Group g holds the ids at places `g * group_size` on of the router's order: the ids themselves (a group is then a view
    of the target's own weight), or, clustered, the permutation `token_order`, for which drafting keeps one copy of the
    head in that order. It is trained after the drafter towards the target's probability mass per group.

    Args:
        hidden_size (`int`): H, width of the drafter's output.
        vocab_size (`int`): V; the last group is shorter where V does not divide evenly.
        num_groups (`int`): G.
        router_hidden_size (`int`): width of the MLP.
        clustered (`bool`): has a `token_order`, see `training.token_clusters`.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, num_groups: int, router_hidden_size: int, clustered: bool = False
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.num_groups = num_groups
        self.group_size = group_size(vocab_size, num_groups)
        self.up_proj = nn.Linear(hidden_size, router_hidden_size, bias=True)
        self.down_proj = nn.Linear(router_hidden_size, num_groups, bias=True)
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

    def groups_of(self, token_ids: torch.LongTensor) -> torch.LongTensor:
        """The group of each id, in the shape of `token_ids`."""
        if self.token_order is None:
            return token_ids // self.group_size
        return self.token_order.long().argsort()[token_ids] // self.group_size


class FrequencyShortlist(nn.Module):
    """The most frequent token ids of a corpus as a fixed shortlist (FR-Spec's baseline).

    Args:
        size (`int`): number of ids kept.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("token_ids", torch.arange(size))

    def count(self, counts: torch.Tensor) -> "FrequencyShortlist":
        """Takes the most frequent ids of `[V]` counts; ties go to the lower id."""
        order = counts.argsort(descending=True, stable=True)[: self.token_ids.numel()]
        self.token_ids.copy_(order.sort().values)
        return self


class DraftVocabularyHead(nn.Linear):
    """An LM head of the drafter's own over a part of the vocabulary (EAGLE-3 section 3), instead of the target's.

    Args:
        hidden_size (`int`): H.
        size (`int`): ids it scores; row i is the target's id `token_ids[i]`.
    """

    def __init__(self, hidden_size: int, size: int):
        super().__init__(hidden_size, size, bias=False)
        self.register_buffer("token_ids", torch.arange(size))


class DraftHead:
    """Scores the tokens that a drafting step considers.

    Without router and shortlist these are the whole vocabulary; with a shortlist its ids; with a router the ids of the
    active groups; with both, the union (the shortlist is always active). A drafter with a head of its own is scored by
    that alone, without the target's scale and soft-cap. Nothing is drawn at random.

    Args:
        adapter ([`TargetAdapter`])
        router ([`LMHeadRouter`], *optional*)
        shortlist ([`FrequencyShortlist`], *optional*)
        active_groups (`int`): groups computed per selection.
        per_row (`bool`): every row has groups of its own; else one choice for all rows of a call, by router mass summed
            over the rows with their path probability as weight.
        scoring (`str`): `"active"`, log-softmax over the active logits, or `"router"`, the router's log P(group) plus
            the log-softmax inside the group (without a shortlist only).
        own_head ([`DraftVocabularyHead`], *optional*): excludes router and shortlist.
    """

    def __init__(
        self,
        adapter: Any,
        router: LMHeadRouter | None = None,
        shortlist: FrequencyShortlist | None = None,
        active_groups: int = 1,
        per_row: bool = False,
        scoring: str = "active",
        own_head: DraftVocabularyHead | None = None,
    ):
        self.adapter, self.router = adapter, router
        self.active_groups, self.per_row, self.scoring = active_groups, per_row, scoring
        self._listed = self._listed_weight = self._listed_bias = self._order = None
        if router is not None:
            if router.token_order is not None:
                self._order = router.token_order.to(adapter.device).long()
            self._grouped_head = ordered_head(adapter, router)
        self._transform = adapter.transform_logits if own_head is None else lambda logits: logits
        if own_head is not None:
            self._listed = own_head.token_ids.to(adapter.device)
            self._listed_weight = own_head.weight.detach().to(adapter.device)
        elif shortlist is not None:
            # one small copy, contiguous for the matmul: FR-Spec's own form
            self._listed = shortlist.token_ids.to(adapter.device)
            self._listed_weight, self._listed_bias = adapter.head_rows(self._listed)
            if router is not None:
                listed = torch.zeros(router.vocab_size, dtype=torch.bool)
                listed[shortlist.token_ids.cpu()] = True
                self._is_listed = router.in_order(listed.to(router.up_proj.weight.device)).to(adapter.device)

    @property
    def fewest_tokens(self) -> int:
        """How many different tokens every row can choose from, whatever groups are active."""
        listed = 0 if self._listed is None else self._listed.numel()
        if self.router is None:
            return listed or self.adapter.vocab_size
        size = self.router.group_size
        padding = self.router.num_groups * size - self.adapter.vocab_size  # in the last group
        return max(listed, self.active_groups * size - padding)

    @torch.inference_mode()
    def top_k(
        self, hidden: torch.Tensor, k: int, weights: torch.Tensor | None = None
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """The k likeliest tokens of each row and their log q.

        Args:
            hidden (`torch.Tensor` of shape `[1, T, H]`): drafter outputs.
            k (`int`).
            weights (`torch.Tensor` of shape `[1, T]`, *optional*): the rows' path probabilities, for a shared choice
                of groups.

        Returns:
            `tuple`: ids and log q, both `[1, T, min(k, active)]`.
        """
        logits, groups, normalizer = self._active_logits(hidden, weights)
        if normalizer is None:
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
        best, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return self._token_ids(index, groups), best - normalizer

    @torch.inference_mode()
    def argmax(self, hidden: torch.Tensor) -> torch.LongTensor:
        """The likeliest token of each row, `[1, T]` for `[1, T, H]`."""
        logits, groups, _ = self._active_logits(hidden, None)
        return self._token_ids(logits.argmax(dim=-1, keepdim=True), groups)[..., 0]

    def _active_logits(self, hidden: torch.Tensor, weights: torch.Tensor | None):
        """fp32 logits `[1, T, A]` (-inf where a slot holds no token), the active groups and log Z where it is known."""
        if self.router is None:
            return self._fixed_logits(hidden).float(), None, None
        group_logits = self.router(hidden).float().to(self.adapter.device)
        hidden = hidden.to(self.adapter.device)
        groups = self._select(group_logits, weights)
        logits = grouped_logits(self._grouped_head, hidden, groups, self.router.group_size).float()  # [1, T, k, s]
        normalizer = None
        if self._listed is not None:
            logits = logits.masked_fill(self._is_listed[groups], float("-inf"))
        if self.scoring == "router":
            log_mass = group_logits.log_softmax(-1).gather(-1, groups.expand(*hidden.shape[:2], -1))
            logits = logits - logits.logsumexp(-1, keepdim=True) + log_mass[..., None]
            normalizer = torch.zeros((), device=logits.device)
        logits = logits.flatten(2)
        if self._listed is not None:
            logits = torch.cat([self._fixed_logits(hidden).float(), logits], dim=-1)
        return logits, groups, normalizer

    def _fixed_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._listed is None:
            return self.adapter.logits(hidden)
        features = hidden.to(self._listed_weight)
        return self._transform(few_row_linear(features, self._listed_weight, self._listed_bias))

    def _select(self, group_logits: torch.Tensor, weights: torch.Tensor | None) -> torch.LongTensor:
        """Group logits `[1, T, G]` -> active groups `[1, T, k]`, or `[1, 1, k]` when all rows share them."""
        if group_logits.shape[1] > 1 and not self.per_row:
            mass = group_logits.softmax(-1)
            if weights is not None:
                mass = mass * weights.to(mass)[..., None]
            group_logits = mass.sum(dim=1, keepdim=True)
        return group_logits.topk(self.active_groups, dim=-1).indices

    def _token_ids(self, index: torch.Tensor, groups: torch.Tensor | None) -> torch.LongTensor:
        """Places `[1, T, n]` among the active logits -> token ids."""
        if groups is None:
            return index if self._listed is None else self._listed[index]
        size, fixed = self.router.group_size, 0 if self._listed is None else self._listed.numel()
        place = (index - fixed).clamp(min=0)
        group = groups.expand(*index.shape[:2], -1).gather(-1, place // size)
        ids = group * size + place % size
        if self._order is not None:
            ids = self._order[ids]
        return (
            ids if self._listed is None else torch.where(index < fixed, self._listed[index.clamp(max=fixed - 1)], ids)
        )


# Per router: its target's head (weakly), the state of weight and order that the copy was made in, and the copy.
_ordered_rows: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def ordered_head(adapter: Any, router: LMHeadRouter) -> Any:
    """What `grouped_logits` reads: the adapter itself, or for a clustered router its head in the router's order.

    The copy is made once for a router and a target, and again when either has changed.

    Raises:
        ValueError: if the router's `token_order` is no permutation of the vocabulary.
    """
    if router.token_order is None:
        return adapter
    head, order = adapter.head, router.token_order
    tensors = (head.weight, getattr(head, "bias", None), order)
    state = [None if tensor is None else _state(tensor) for tensor in tensors]
    kept = _ordered_rows.get(router)
    if kept is None or kept[0]() is not head or kept[1] != state:
        ids = order.to(adapter.device).long()
        if not torch.equal(ids.sort().values, torch.arange(adapter.vocab_size, device=ids.device)):
            raise ValueError(
                f"The router's token_order is no permutation of the {adapter.vocab_size} ids: its checkpoint is damaged. "
                "Train the router again (`coral-hf train --stage router`), or use draft_head='full'."
            )
        kept = _ordered_rows[router] = (weakref.ref(head), state, adapter.head_rows(ids))
    weight, bias = kept[2]
    return _OrderedHead(adapter, weight, bias)


def _state(tensor: torch.Tensor) -> tuple:
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

    def head_rows(self, places: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.head.weight[places], None if self.head.bias is None else self.head.bias[places]


def grouped_logits(adapter: Any, hidden: torch.Tensor, groups: torch.LongTensor, size: int) -> torch.Tensor:
    """Logits of the rows in the given groups of `size` consecutive rows.

    On a CPU one matmul per distinct group on a view of the head, nothing gathered; elsewhere `gathered_logits`, which
    never waits for the device.

    Args:
        adapter ([`TargetAdapter`], or what `ordered_head` returns)
        hidden (`torch.Tensor` of shape `[1, T, H]`).
        groups (`torch.LongTensor` of shape `[1, T, k]` or, shared by all rows, `[1, 1, k]`).
        size (`int`): ids per group.

    Returns:
        `torch.Tensor` of shape `[1, T, k, size]`, -inf past the end of the vocabulary.
    """
    if groups.device.type != "cpu":
        return gathered_logits(adapter, hidden, groups, size)
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
        row, place = (list(column) for column in zip(*places, strict=True))
        logits[0, row, place] = _group_logits(adapter, features[0, row], group, size)
    return _without_padding(adapter, logits, groups)


def _group_logits(adapter: Any, features: torch.Tensor, group: int, size: int) -> torch.Tensor:
    """Untransformed logits `[..., size]` of one group, through a view of the head."""
    ids = slice(group * size, min((group + 1) * size, adapter.vocab_size))
    bias = getattr(adapter.head, "bias", None)
    logits = few_row_linear(features, adapter.head.weight[ids], None if bias is None else bias[ids])
    return F.pad(logits, (0, size - logits.shape[-1])) if logits.shape[-1] < size else logits


def _without_padding(adapter: Any, logits: torch.Tensor, groups: torch.LongTensor) -> torch.Tensor:
    """Transforms `[1, T, k, size]` logits, then marks what lies past the vocabulary: soft-capping would lift a -inf."""
    logits, size = adapter.transform_logits(logits), logits.shape[-1]
    last = (adapter.vocab_size - 1) // size
    width = adapter.vocab_size - last * size
    if width < size:
        padding = torch.arange(size, device=logits.device) >= width
        logits = logits.masked_fill((groups == last)[..., None] & padding, float("-inf"))
    return logits


def gathered_logits(adapter: Any, hidden: torch.Tensor, groups: torch.LongTensor, size: int) -> torch.Tensor:
    """`grouped_logits` by gathering the head's rows: slower on a CPU, static shapes and no host sync on a GPU."""
    ids = groups[..., None] * size + torch.arange(size, device=groups.device)  # [1, T or 1, k, size]
    weight, bias = adapter.head_rows(ids.clamp(max=adapter.vocab_size - 1))
    features = hidden.to(weight)
    logits = torch.einsum("bth,btksh->btks", features, weight.expand(-1, hidden.shape[1], -1, -1, -1))
    if bias is not None:
        logits = logits + bias
    return adapter.transform_logits(logits).masked_fill(ids >= adapter.vocab_size, float("-inf"))


__all__ = [
    "DraftHead",
    "DraftVocabularyHead",
    "FrequencyShortlist",
    "LMHeadRouter",
    "gathered_logits",
    "grouped_logits",
    "ordered_head",
]
