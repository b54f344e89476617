"""Cheap draft heads: LMHeadRouter and FrequencyShortlist choose the rows of the target's LM head that are computed.

The verification always uses the full head, so that what is chosen here changes the speed and never the output.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_coral import group_count, group_size
from .few_rows import few_row_linear
from .grouped_logits import gathered_logits, grouped_logits, kept_copy, ordered_head
from .target_adapter import placed


class LMHeadRouter(nn.Module):
    """Which groups of token ids are worth computing (CORAL section 3.2).

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


class FrequencyShortlist(nn.Module):
    """The most frequent token ids of a corpus as a fixed shortlist (FR-Spec's baseline).

    Args:
        size (`int`): number of ids kept.
    """

    token_ids: torch.Tensor

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

    token_ids: torch.Tensor

    def __init__(self, hidden_size: int, size: int):
        super().__init__(hidden_size, size, bias=False)
        self.register_buffer("token_ids", torch.arange(size))


def checked_ids(owner: FrequencyShortlist | DraftVocabularyHead, vocab_size: int) -> torch.Tensor:
    """The owner's `token_ids`; a damaged checkpoint may contain any.

    Raises:
        ValueError: if one is not an id of the vocabulary, or is there twice: siblings of a draft tree hold different tokens.
    """
    # not by class: a drafter loaded as remote code has others
    ids, name = owner.token_ids, "draft_head" if hasattr(owner, "weight") else "shortlist"
    outside = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    if outside:
        problem = f"contains {outside[0]}, which is none of the {vocab_size} ids"
    elif ids.unique().numel() < ids.numel():
        problem = "contains an id twice"
    else:
        return ids
    other = ", or use draft_head='full'" if name == "shortlist" else ""
    raise ValueError(f"{name}.token_ids {problem}: the drafter's checkpoint is damaged. Fetch it again{other}.")


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

    Raises:
        ValueError: if an id of the shortlist, the router's order or the head of the drafter's own is damaged, or rows are
            to be taken of a quantised head.
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
            size = adapter.vocab_size
            self._listed = kept_copy(own_head, own_head.token_ids, own_head, lambda: checked_ids(own_head, size))
            self._listed = self._listed.to(adapter.device)
            self._listed_weight = own_head.weight.detach().to(adapter.device)
        elif shortlist is not None:
            adapter.check_rows()

            # one small copy, contiguous for the matmul: FR-Spec's own form
            def copy_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
                ids = checked_ids(shortlist, adapter.vocab_size).to(adapter.device)
                return ids, *adapter.head_rows(ids)

            kept = kept_copy(shortlist, shortlist.token_ids, adapter.head, copy_rows)
            self._listed, self._listed_weight, self._listed_bias = kept
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens of each row and their log q.

        Args:
            hidden (`torch.Tensor` of shape `[B, T, H]`): drafter outputs.
            k (`int`).
            weights (`torch.Tensor` of shape `[B, T]`, *optional*): the rows' path probabilities, for a shared choice
                of groups.

        Returns:
            `tuple`: ids and log q, both `[B, T, min(k, active)]`.
        """
        return self.likeliest(hidden, k, weights)

    def likeliest(
        self, hidden: torch.Tensor, k: int, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`top_k`] in whatever mode the caller is in, as a graph needs it."""
        logits, groups, normalizer = self._active_logits(hidden, weights)
        if normalizer is None:
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
        best, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return self._token_ids(index, groups), best - normalizer

    @torch.inference_mode()
    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row, `[B, T]` for `[B, T, H]`."""
        logits, groups, _ = self._active_logits(hidden, None)
        return self._token_ids(logits.argmax(dim=-1, keepdim=True), groups)[..., 0]

    def _active_logits(self, hidden: torch.Tensor, weights: torch.Tensor | None):
        """fp32 logits `[B, T, A]` (-inf where a slot contains no token), the active groups and log Z where it is known."""
        if self.router is None:
            logits = self._fixed_logits(hidden)
            return placed(logits, logits.device, torch.float32), None, None
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
        if self._listed_weight is None:
            return self.adapter.logits(hidden)
        features = placed(hidden, self._listed_weight.device, self._listed_weight.dtype)
        return self._transform(few_row_linear(features, self._listed_weight, self._listed_bias))

    def _select(self, group_logits: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Group logits `[B, T, G]` -> active groups `[B, T, k]`, or `[B, 1, k]` when all rows share them."""
        if group_logits.shape[1] > 1 and not self.per_row:
            mass = group_logits.softmax(-1)
            if weights is not None:
                mass = mass * weights.to(mass)[..., None]
            group_logits = mass.sum(dim=1, keepdim=True)
        return group_logits.topk(self.active_groups, dim=-1).indices

    def _token_ids(self, index: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        """Places `[B, T, n]` among the active logits -> token ids."""
        if groups is None or self.router is None:
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


__all__ = [
    "DraftHead",
    "DraftVocabularyHead",
    "FrequencyShortlist",
    "LMHeadRouter",
    "gathered_logits",
    "grouped_logits",
    "ordered_head",
]
