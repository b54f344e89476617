"""A drafted tree merged with a path that is known beforehand. Each node appears once."""

from collections.abc import Callable

import torch

from ..draft_tree import DraftTree, DraftTreeBuilder


class GraftedTreeBuilder(DraftTreeBuilder):
    """A [`DraftTreeBuilder`] whose tree may also take nodes of a path from the root.

    If the drafter also proposes a node of the path (its twin), the node is stored once with the larger of both chances, and
    the path continues below it. The path does not change which nodes the drafter expands.

    Args:
        root, top_k, calibrate: as for [`DraftTreeBuilder`].
        path (`torch.LongTensor` of shape `[B, L]`): tokens, each the child of the one before.
        path_chances (`torch.FloatTensor` of shape `[B, L]`): chances of acceptance, non-increasing; 0 for nodes to ignore.
    """

    def __init__(
        self,
        root: torch.Tensor,
        top_k: int,
        calibrate: Callable[[torch.Tensor, int], torch.Tensor] | None,
        path: torch.Tensor,
        path_chances: torch.Tensor,
    ):
        super().__init__(root, top_k, calibrate)
        self._path, self._path_chances = path, path_chances
        self._ranks: list[torch.Tensor] = []  # chances of the stored nodes except the root, at least their twins'
        self._twins = [torch.zeros_like(root[:, 0])]  # stored index of the path's node at each depth; -1: not drafted

    def add_level(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        expanded, offset, depth = self._open, sum(self._sizes), self.num_levels
        added = super().add_level(tokens, log_probs)
        chances = self._chances[-1] if self._chances else self._scores[-1].exp()  # [B, W * top_k]
        if depth < self._path.shape[1]:
            below = (expanded == self._twins[-1][:, None])[..., None]  # [B, W, 1]: whose children may be the twin
            same = ((tokens == self._path[:, depth, None, None]) & below).flatten(1)  # [B, W * top_k], one at most
            raised = torch.maximum(chances, self._path_chances[:, depth, None])
            chances = torch.where(same, raised, chances)
            place = same.int().argmax(dim=1) + offset
            self._twins.append(torch.where(same.any(dim=1), place, -1))
        self._ranks.append(chances)
        return added

    def chances(self) -> torch.Tensor:
        """Ranks of the drafted nodes, then of the path's nodes, `[B, M + L]`. A path node with a twin has rank 0."""
        twins = self._twins_of_path()
        return torch.cat([*self._ranks, self._path_chances.masked_fill(twins >= 0, 0.0)], dim=1)

    def _twins_of_path(self) -> torch.Tensor:
        """`[B, L]`, -1 for nodes that were not drafted."""
        twins = torch.stack(self._twins[1:], dim=1)
        return torch.nn.functional.pad(twins, (0, self._path.shape[1] - twins.shape[1]), value=-1)

    def build(self, total_tokens: int) -> DraftTree:
        drafted, length = sum(self._sizes), self._path.shape[1]
        twins = self._twins_of_path()
        # the parent of a path node is the twin of the node before, if there is one
        before = torch.cat([torch.zeros_like(twins[:, :1]), twins[:, :-1]], dim=1)  # [B, L]; the root is its own twin
        places = torch.arange(drafted - 1, drafted - 1 + length, device=twins.device)
        self._grafts = torch.where(before >= 0, before, places)
        self._tokens.append(self._path)
        self._scores.append(self._path_chances.clamp(min=1e-30).log())
        chances = self.chances()
        chances[:, drafted - 1 :].masked_fill_(self._path_chances == 0, -1.0).masked_fill_(twins >= 0, -1.0)
        self._chances = [chances]
        return super().build(total_tokens)

    def _lineage(self, kept: torch.Tensor, expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drafted = sum(self._sizes)
        depths, parents = super()._lineage(kept.clamp(max=drafted - 1), expanded)
        place = (kept - drafted).clamp(min=0)
        of_path = kept >= drafted
        return torch.where(of_path, place + 1, depths), torch.where(of_path, self._grafts.gather(1, place), parents)

    @property
    def _deepest(self) -> int:
        return max(self.num_levels, self._path.shape[1])


__all__ = ["GraftedTreeBuilder"]
