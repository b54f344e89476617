"""Cheap draft heads: LMHeadRouter, FrequencyShortlist, LowRankHead and the ids of the text so far choose the rows of the target's
LM head that are computed.

The verification always uses the full head, so that what is chosen here changes the speed and never the output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .few_rows import few_row_linear
from .head_rows import ContextList, LMHeadRouter, gathered_logits, grouped_logits, kept_copy, ordered_head
from .target_adapter import placed


# Of an in-context list without a shortlist: ids that it begins with (ours). Tokenizers give low ids to frequent tokens.
FIRST_IDS, FIRST_SHARE = 1024, 32


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


class LowRankHead(nn.Module):
    """The target's LM head as a product of two small matrices, which selects the ids to score exactly.

    It begins as the truncated SVD of the head (`draft_initialization.truncated_svd`) and is trained towards the full head's
    distribution (EAGLE-4; SlimSpec, arXiv 2605.10453, drafts from such a head alone).

    Args:
        hidden_size (`int`): H.
        vocab_size (`int`): V.
        rank (`int`): r, the size between the two matrices.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int):
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, rank, bias=False)
        self.up_proj = nn.Linear(rank, vocab_size, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> "LowRankHead":
        """The head that a [`CoralDraftConfig`] describes, with random weights."""
        return cls(config.hidden_size, config.vocab_size, config.low_rank_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drafter outputs `[..., H]` -> estimated products with the head's rows, `[..., V]`."""
        return self.up_proj(self.down_proj(hidden.to(self.down_proj.weight.dtype)))

    def logits(self, hidden: torch.Tensor, adapter: Any) -> torch.Tensor:
        """Drafter outputs `[..., H]` -> the target's estimated logits `[..., V]`, with its bias, scale and soft-cap."""
        logits = self(hidden)
        bias = getattr(adapter.head, "bias", None)
        return adapter.transform_logits(logits if bias is None else logits + bias.to(logits))


class DraftVocabularyHead(nn.Linear):
    """The drafter's own LM head over a part of the vocabulary (EAGLE-3 section 3), in place of the target's.

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

    Without router, shortlist and low-rank head these are the whole vocabulary; with a shortlist its ids; with a router the ids
    of the active groups; with both, the union (the shortlist is always active). With a low-rank head these are its best ids:
    their logits are the full head's own, and log q is normalised over the vocabulary, by its estimates of all others. A drafter
    with a head of its own is scored by that alone, without the target's scale and soft-cap. Nothing is drawn at random.

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
        low_rank ([`LowRankHead`], *optional*): excludes router and shortlist.
        candidates (`int`): best ids of the low-rank head, of each row.
        reads_text (`bool`): the ids given to [`read`] are active besides the shortlist's; without a shortlist, besides the first
            ids of the vocabulary. Excludes router, low-rank and own head.

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
        low_rank: LowRankHead | None = None,
        candidates: int = 1,
        reads_text: bool = False,
    ):
        self.adapter, self.router, self.low_rank = adapter, router, low_rank
        self.active_groups, self.per_row, self.scoring = active_groups, per_row, scoring
        self.candidates = candidates
        self._listed = self._listed_weight = self._listed_bias = self._order = None
        self._context: ContextList | None = None
        if low_rank is not None:
            adapter.check_rows()
        if router is not None:
            if router.token_order is not None:
                self._order = router.token_order.to(adapter.device).long()
            self._grouped_head = ordered_head(adapter, router)
        if reads_text and shortlist is None:
            shortlist = FrequencyShortlist(min(FIRST_IDS, max(1, adapter.vocab_size // FIRST_SHARE)))
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
            if reads_text:
                self._context = ContextList(adapter, self._listed)

    @property
    def fewest_tokens(self) -> int:
        """The smallest number of tokens that every row can choose from, for any active groups and texts."""
        if self.low_rank is not None:
            return self.candidates
        listed = 0 if self._listed is None else self._listed.numel()
        if self.router is None:
            return listed or self.adapter.vocab_size
        size = self.router.group_size
        padding = self.router.num_groups * size - self.adapter.vocab_size  # in the last group
        return max(listed, self.active_groups * size - padding)

    @property
    def reads_text(self) -> bool:
        """Whether [`read`] needs the ids of the texts."""
        return self._context is not None

    @torch.inference_mode()
    def read(self, token_ids: torch.Tensor) -> None:
        """Makes ids (of any shape) active for all rows of a call, in a head that reads the text."""
        if self._context is not None:
            self._context.add(token_ids)
            self._listed = self._context.token_ids

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
        """[`top_k`] in the caller's gradient mode, as graphs require."""
        logits, chosen, normalizer = self._active_logits(hidden, weights)
        log_z = logits.logsumexp(dim=-1, keepdim=True) if normalizer is None else normalizer()
        best, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return self._token_ids(index, chosen), best - log_z

    @torch.inference_mode()
    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row, `[B, T]` for `[B, T, H]`."""
        logits, chosen, _ = self._active_logits(hidden, None)
        return self._token_ids(logits.argmax(dim=-1, keepdim=True), chosen)[..., 0]

    def _active_logits(
        self, hidden: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, Callable[[], torch.Tensor] | None]:
        """fp32 logits `[B, T, A]` (-inf for slots without a token); the active groups, or a low-rank head's candidates; and a
        function for log Z if it is not that of these logits."""
        if self.low_rank is not None:
            return self._rescored_logits(hidden)
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
            zero = torch.zeros((), device=logits.device)
            normalizer = lambda: zero  # noqa: E731
        logits = logits.flatten(2)
        if self._listed is not None:
            logits = torch.cat([self._fixed_logits(hidden).float(), logits], dim=-1)
        return logits, groups, normalizer

    def _rescored_logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]:
        """The full head's logits of the low-rank head's best ids `[B, T, m]`, these ids, and a function for log Z over all."""
        low_rank: Any = self.low_rank
        estimate = low_rank.logits(hidden, self.adapter).float()  # [B, T, V]
        best = estimate.topk(self.candidates, dim=-1).indices
        ids = best.to(self.adapter.device)
        exact = gathered_logits(self.adapter, hidden, ids, 1)[..., 0].float()

        def normalizer() -> torch.Tensor:
            others = estimate.scatter_(-1, best, float("-inf")).logsumexp(dim=-1, keepdim=True)
            return torch.logaddexp(exact.logsumexp(dim=-1, keepdim=True), others.to(exact.device))

        return exact, ids, normalizer

    def _fixed_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._listed_weight is None:
            return self.adapter.logits(hidden)
        features = placed(hidden, self._listed_weight.device, self._listed_weight.dtype)
        logits = few_row_linear(features, self._listed_weight, self._listed_bias)
        if self._context is not None and (more := self._context.logits(features)) is not None:
            logits = torch.cat([logits, more], dim=-1)
        return self._transform(logits)

    def _select(self, group_logits: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Group logits `[B, T, G]` -> active groups `[B, T, k]`, or `[B, 1, k]` when all rows share them."""
        if group_logits.shape[1] > 1 and not self.per_row:
            mass = group_logits.softmax(-1)
            if weights is not None:
                mass = mass * weights.to(mass)[..., None]
            group_logits = mass.sum(dim=1, keepdim=True)
        return group_logits.topk(self.active_groups, dim=-1).indices

    def _token_ids(self, index: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
        """Places `[B, T, n]` among the active logits -> token ids."""
        if self.low_rank is not None and chosen is not None:
            return chosen.gather(-1, index)
        if chosen is None or self.router is None:
            return index if self._listed is None else self._listed[index]
        size, fixed = self.router.group_size, 0 if self._listed is None else self._listed.numel()
        place = (index - fixed).clamp(min=0)
        group = chosen.expand(*index.shape[:2], -1).gather(-1, place // size)
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
    "LowRankHead",
    "gathered_logits",
    "grouped_logits",
    "ordered_head",
]
