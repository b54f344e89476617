"""DraftTree: drafted tokens as plain tensors (tokens, parents, depths, scores, ancestors). Independent of any model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass
class DraftTree:
    """A tree of drafted tokens, with parents before children. Node 0 is the root: the last accepted token.

    Args:
        tokens (`torch.LongTensor` of shape `[B, N]`).
        parents (`torch.LongTensor` of shape `[B, N]`): index of each node's parent; the root's is -1.
        depths (`torch.LongTensor` of shape `[B, N]`): 0 for the root.
        scores (`torch.FloatTensor` of shape `[B, N]`): log-probability of the path from the root, in fp32.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): row i marks node i itself and everything above it.
        is_chain (`bool`): the parent of every node is the node before it.
        known_parents (`list[list[int]]`, *optional*): `parents`, once the host has read them.
        promise ([`DraftPromise`], *optional*): expectations for a tree with a cost-aware size.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    scores: torch.Tensor
    ancestors: torch.Tensor
    is_chain: bool = False
    known_parents: list[list[int]] | None = None
    promise: "DraftPromise | None" = None

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def depth(self) -> int:
        # The depth of a chain is known without a transfer.
        return self.num_nodes - 1 if self.is_chain else int(self.depths.max())

    def row_depths(self) -> list[int]:
        """The depth of each row's tree, without a transfer if the host knows enough."""
        if self.is_chain:
            return [self.depth] * len(self.tokens)
        if self.known_parents is None:
            return self.depths.amax(dim=1).tolist()
        found = []
        for parents in self.known_parents:
            depths = [0]
            for parent in parents[1:]:
                depths.append(depths[parent] + 1)
            found.append(max(depths))
        return found

    @classmethod
    def chain(cls, tokens: torch.Tensor, scores: torch.Tensor | None = None) -> "DraftTree":
        """A tree of width one from `[B, N]` tokens (root first)."""
        batch, count = tokens.shape
        parents, depths, zeros, ancestors = _chain(batch, count, tokens.device)
        return cls(tokens, parents, depths, zeros if scores is None else scores, ancestors, is_chain=True)


@dataclass(frozen=True)
class DraftPromise:
    """What the rule that chose a tree's size expects from the step.

    Args:
        accepted (`float`): accepted drafted tokens per row, on average.
        step_ms (`float`): time for drafting and verifying.
        plain_ms (`float`): time of a step without a draft.
    """

    accepted: float
    step_ms: float
    plain_ms: float


class DraftTreeBuilder:
    """Collects the levels of a dynamic tree (EAGLE-2 section 4) and keeps its best nodes.

    Every proposed node is stored. Each level expands the best proposals of the level before. At the end, the best
    `total_tokens - 1` stored nodes are kept. A child's score never exceeds its parent's. Among equal scores, the node stored
    first (the parent) wins. The kept nodes therefore always form a tree.

    The root is node 0. The children of the i-th expanded node are nodes `1 + i * top_k` and following. Parents and depths
    therefore follow from the index.

    Args:
        root (`torch.LongTensor` of shape `[B, 1]`): the last accepted token.
        top_k (`int`): branches per node, and nodes expanded per level.
        calibrate (`Callable`, *optional*): path probabilities `[B, M]` and their depth -> chances of acceptance
            `[B, M]`, which then rank the nodes.

    Attributes:
        scores (`torch.FloatTensor` of shape `[B, W]`): log path probabilities of the nodes to expand next.
    """

    def __init__(
        self,
        root: torch.Tensor,
        top_k: int,
        calibrate: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ):
        self.top_k = top_k
        self.scores = torch.zeros(root.shape, dtype=torch.float32, device=root.device)
        self._tokens, self._scores = [root], [self.scores]
        self._calibrate = calibrate
        self._chances: list[torch.Tensor] = []  # of all stored nodes except the root
        self._open_chances = torch.ones_like(self.scores)
        self._sizes = [1]  # nodes stored at each depth
        self._expanded: list[torch.Tensor] = []  # stored indices of the nodes that were expanded
        self._open = torch.zeros_like(root)  # and of those to expand next
        self._before, self._parent = self.scores, self._open  # scores or chances before, and which are the parents'

    @property
    def num_levels(self) -> int:
        return len(self._sizes) - 1

    def add_level(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Stores the children of the expanded nodes: first of the root, then of the nodes that the last call returned.

        Args:
            tokens (`torch.LongTensor` of shape `[B, W, top_k]`): children of W expanded nodes.
            log_probs (`torch.FloatTensor` of shape `[B, W, top_k]`): log q of each child.

        Returns:
            `tuple`: tokens, stored indices and parents (among the W expanded nodes) of the `top_k` best new nodes, each
            `[B, top_k]`.
        """
        branches = tokens.shape[2]
        # NaN (from a drafter that overflows in float16) would sort first, and a child would be kept without its parent.
        log_probs = log_probs.nan_to_num(nan=-torch.inf, posinf=0.0, neginf=-torch.inf).clamp(max=0.0)
        scores = (self.scores[..., None] + log_probs).flatten(1)  # [B, W * top_k]
        tokens = tokens.flatten(1)  # [B, W * top_k]
        best, order = scores.sort(dim=1, descending=True, stable=True)
        before, order = self.scores, order[:, : self.top_k]
        self.scores = best[:, : self.top_k]
        parent = order // branches
        self._expanded.append(self._open)
        self._before, self._parent = (before if self._calibrate is None else self._open_chances), parent
        self._open = order + sum(self._sizes)
        self._sizes.append(tokens.shape[1])
        self._tokens.append(tokens)
        self._scores.append(scores)
        if self._calibrate is not None:
            # A child is only accepted after its parent. This bound also ensures that the kept nodes form a tree.
            chances = self._calibrate(scores.exp(), self.num_levels).unflatten(1, (-1, branches))
            chances = torch.minimum(chances, self._open_chances[..., None]).flatten(1)  # [B, W * top_k]
            self._chances.append(chances)
            self._open_chances = chances.gather(1, order)
        return tokens.gather(1, order), self._open, parent

    @property
    def open_chances(self) -> torch.Tensor:
        """Chances of acceptance of the nodes to expand next, `[B, W]`."""
        return self.scores.exp() if self._calibrate is None else self._open_chances

    @property
    def parent_chances(self) -> torch.Tensor:
        """Chances of acceptance of their parents, `[B, W]`."""
        chances = self._before.exp() if self._calibrate is None else self._before
        return chances.gather(1, self._parent)

    def chances(self) -> torch.Tensor:
        """Chances of acceptance of all stored nodes except the root, `[B, M]`: calibrated, or as drafted."""
        return torch.cat(self._chances, 1) if self._chances else torch.cat(self._scores[1:], dim=1).exp()

    def stored(self) -> tuple[torch.Tensor, ...]:
        """Tokens, scores and ranks of all stored nodes, `[B, M]`, and the indices of the expanded nodes."""
        tokens, scores = torch.cat(self._tokens, dim=1), torch.cat(self._scores, dim=1)
        ranks = torch.cat([torch.ones_like(self._scores[0]), *self._chances], dim=1) if self._chances else scores
        return tokens, scores, ranks, torch.cat(self._expanded, dim=1)

    def build(self, total_tokens: int) -> DraftTree:
        """The tree of the best `total_tokens` nodes, including the root (fewer if fewer were stored)."""
        tokens, scores, ranks, expanded = self.stored()
        best = ranks.argsort(dim=1, descending=True, stable=True)[
            :, :total_tokens
        ]  # the root is the first of the best
        kept = best.sort(dim=1).values  # [B, N]: back in stored order, in which parents precede children
        depths, stored_parents = self._lineage(kept, expanded)
        parents = torch.searchsorted(kept, stored_parents)  # their new indices
        parents[:, 0] = -1
        return DraftTree(
            tokens=tokens.gather(1, kept),
            parents=parents,
            depths=depths,
            scores=scores.gather(1, kept),
            ancestors=ancestors_of(parents, self._deepest),
        )

    def _lineage(self, kept: torch.Tensor, expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Depths of stored nodes `[B, N]`, and the stored indices of their parents (arbitrary for the root)."""
        depths, expander = _places(self.top_k, tuple(self._sizes), kept.device)
        return depths[kept], expanded.gather(1, expander[kept])

    @property
    def _deepest(self) -> int:
        return self.num_levels


@cache
def _places(top_k: int, sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth of each stored node, and which of the expanded nodes is its parent (arbitrary for the root)."""
    depths = [depth for depth, size in enumerate(sizes) for _ in range(size)]
    return (
        torch.tensor(depths, device=device),
        torch.tensor([max(place - 1, 0) // top_k for place in range(len(depths))], device=device),
    )


def ancestors_of(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Ancestor-or-self matrix `[B, N, N]` of `[B, N]` parents (root: -1), by repeated squaring of the parent step."""
    return reached(parents, *_order(parents.shape[1], parents.device), max_depth)


def reached(parents: torch.Tensor, order: torch.Tensor, itself: torch.Tensor, max_depth: int) -> torch.Tensor:
    """[`ancestors_of`] with 0..N-1 and the identity matrix in float32 as arguments."""
    reach = itself + (parents[..., None] == order)  # the root's -1 matches no index
    steps = 1
    while steps < max_depth:
        reach = reach @ reach  # counts paths, exact in float32
        steps *= 2
    return reach > 0


@cache
def _chain(batch: int, count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Parents, depths, scores and ancestors of a chain with unknown chances."""
    order, _ = _order(count, device)
    return (
        (order - 1).expand(batch, count),
        order.expand(batch, count),
        torch.zeros(batch, count, device=device),
        (order <= order[:, None]).expand(batch, count, count),
    )


@cache
def _order(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count, device=device), torch.eye(count, device=device)


__all__ = ["DraftPromise", "DraftTree", "DraftTreeBuilder", "ancestors_of", "reached"]
