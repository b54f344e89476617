"""DraftTree: drafted tokens as plain tensors - tokens, parents, depths, scores, ancestors. No model in here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class DraftTree:
    """A tree of drafted tokens, parents before children; node 0 is the root, the last accepted token.

    Args:
        tokens (`torch.LongTensor` of shape `[B, N]`).
        parents (`torch.LongTensor` of shape `[B, N]`): index of each node's parent; the root's is -1.
        depths (`torch.LongTensor` of shape `[B, N]`): 0 for the root.
        scores (`torch.FloatTensor` of shape `[B, N]`): log-probability of the path from the root, in fp32.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): row i marks node i itself and everything above it.
        is_chain (`bool`): every node's parent is the node before it.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    scores: torch.Tensor
    ancestors: torch.Tensor
    is_chain: bool = False

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def depth(self) -> int:
        # A chain's is known without asking its device.
        return self.num_nodes - 1 if self.is_chain else int(self.depths.max())

    def row_depths(self) -> list[int]:
        """The depth of each row's tree."""
        return [self.depth] * len(self.tokens) if self.is_chain else self.depths.amax(dim=1).tolist()

    @classmethod
    def chain(cls, tokens: torch.Tensor, scores: torch.Tensor | None = None) -> "DraftTree":
        """A tree of width one from `[B, N]` tokens (root first)."""
        batch, count = tokens.shape
        order = torch.arange(count, device=tokens.device)
        return cls(
            tokens=tokens,
            parents=(order - 1).expand(batch, count),
            depths=order.expand(batch, count),
            scores=tokens.new_zeros(batch, count, dtype=torch.float32) if scores is None else scores,
            ancestors=(order <= order[:, None]).expand(batch, count, count),
            is_chain=True,
        )


class DraftTreeBuilder:
    """Collects the levels of a dynamic tree (EAGLE-2 section 4) and keeps its best nodes.

    Every proposed node is stored; each next level expands the best of the last level's proposals; at the end the best
    `total_tokens - 1` stored nodes stay. A child's score never exceeds its parent's, and among equal scores the node
    stored first (the parent) wins, so that what is kept is always a tree.

    Args:
        root (`torch.LongTensor` of shape `[B, 1]`): the last accepted token.
        top_k (`int`): branches per node, and nodes expanded per level.
        calibrate (`Callable`, *optional*): path probabilities `[B, M]` and their depth -> chances of acceptance
            `[B, M]`, by which the best nodes are then kept.
    """

    def __init__(
        self,
        root: torch.Tensor,
        top_k: int,
        calibrate: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ):
        self.root = root
        self.top_k = top_k
        self._tokens = [root]
        self._parents = [torch.full_like(root, -1)]
        self._depths = [torch.zeros_like(root)]
        self._scores = [torch.zeros(root.shape, dtype=torch.float32, device=root.device)]
        self._calibrate = calibrate
        self._chances = [torch.ones(root.shape, dtype=torch.float32, device=root.device)]
        self._count = 1
        self._level = 0

    @property
    def num_levels(self) -> int:
        return self._level

    def add_level(self, tokens: torch.Tensor, log_probs: torch.Tensor, parents: torch.Tensor | None = None):
        """Stores the children of the nodes expanded last.

        Args:
            tokens (`torch.LongTensor` of shape `[B, W, top_k]`): children of W expanded nodes.
            log_probs (`torch.FloatTensor` of shape `[B, W, top_k]`): log q of each child.
            parents (`torch.LongTensor` of shape `[B, W]`, *optional*): stored indices of those nodes, as the previous
                call returned them; None for the root.

        Returns:
            `tuple`: of the `top_k` best new nodes, each `[B, top_k]`: their tokens, their stored indices, and which of
            the W expanded nodes is the parent.
        """
        batch, width, branches = tokens.shape
        if parents is None:
            parents = torch.zeros(batch, width, dtype=torch.long, device=tokens.device)
        all_scores = torch.cat(self._scores, dim=1)  # [B, stored]
        # NaN, of a drafter whose float16 overflows, sorts before everything: a child would be kept without its parent.
        log_probs = log_probs.float().nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp(max=0.0)
        scores = all_scores.gather(1, parents)[..., None] + log_probs  # [B, W, top_k]
        scores, tokens = scores.flatten(1), tokens.flatten(1)  # [B, W * top_k]
        self._level += 1
        self._tokens.append(tokens)
        self._scores.append(scores)
        self._parents.append(parents.repeat_interleave(branches, dim=1))
        self._depths.append(torch.full_like(tokens, self._level))
        if self._calibrate is not None:
            # A child is accepted after its parent only: the bound also keeps what is kept a tree.
            bound = self.chances(parents).repeat_interleave(branches, dim=1)  # [B, W * top_k]
            self._chances.append(torch.minimum(self._calibrate(scores.exp(), self._level), bound))
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]  # [B, top_k]
        stored = order + self._count
        self._count += tokens.shape[1]
        return tokens.gather(1, order), stored, order // branches

    def path_probabilities(self, stored: torch.Tensor) -> torch.Tensor:
        """Drafted probability of the path to stored nodes, `[B, W]` for `[B, W]` indices."""
        return torch.cat(self._scores, dim=1).gather(1, stored).exp()

    def chances(self, stored: torch.Tensor | None = None) -> torch.Tensor:
        """Calibrated chances of acceptance of stored nodes, `[B, W]` for `[B, W]` indices; None: all but the root."""
        if self._calibrate is None:
            return torch.cat(self._scores[1:], dim=1).exp() if stored is None else self.path_probabilities(stored)
        return torch.cat(self._chances[1:], 1) if stored is None else torch.cat(self._chances, 1).gather(1, stored)

    def build(self, total_tokens: int) -> DraftTree:
        """The tree of the best `total_tokens` nodes, root included (fewer if fewer were stored)."""
        tokens, parents = torch.cat(self._tokens, dim=1), torch.cat(self._parents, dim=1)
        depths, scores = torch.cat(self._depths, dim=1), torch.cat(self._scores, dim=1)
        ranks = scores[:, 1:] if self._calibrate is None else self.chances()
        best = ranks.argsort(dim=1, descending=True, stable=True)[:, : total_tokens - 1] + 1
        # Back into stored order, in which parents precede children; the root in front.
        kept = torch.cat([torch.zeros_like(self.root), best.sort(dim=1).values], dim=1)  # [B, N]
        batch, count = kept.shape
        new_index = torch.zeros_like(tokens).scatter(
            1, kept, torch.arange(count, device=kept.device).expand(batch, -1)
        )
        old_parents = parents.gather(1, kept)
        new_parents = new_index.gather(1, old_parents.clamp(min=0)).masked_fill(old_parents < 0, -1)
        return DraftTree(
            tokens=tokens.gather(1, kept),
            parents=new_parents,
            depths=depths.gather(1, kept),
            scores=scores.gather(1, kept),
            ancestors=ancestors_of(new_parents, self._level),
        )


def ancestors_of(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Ancestor-or-self matrix `[B, N, N]` of `[B, N]` parents (root: -1), by repeated squaring of the parent step."""
    count = parents.shape[1]
    reach = torch.eye(count, dtype=torch.float32, device=parents.device).expand(parents.shape[0], -1, -1).clone()
    hop = torch.zeros_like(reach).scatter_(2, parents.clamp(min=0)[..., None], 1.0)
    hop[:, 0] = 0.0  # the root has no parent
    reach = reach + hop
    steps = 1
    while steps < max_depth:
        reach = (reach @ reach).clamp(max=1.0)
        steps *= 2
    return reach > 0


__all__ = ["DraftTree", "DraftTreeBuilder", "ancestors_of"]
