"""Drafts the levels of a tree or the tokens of a chain after the true rows of a drafter's cache."""

from functools import cache
from typing import Any

import torch

from ..drafter.draft_head import DraftHead
from ..drafter.draft_layer import DraftKeyValues
from ..drafter.target_adapter import TargetAdapter, placed
from .costs.pace import AnyCosts
from .draft_tree import DraftPromise, DraftTree, DraftTreeBuilder
from .lookup.grafting import GraftedTreeBuilder
from .lookup.lookup_nodes import Found
from .settings import DraftSettings
from .tree_size import TreeSizeRule, calibration_of


_BLOCK = 512  # positions that a rotary table grows by


class RotaryTable:
    """RoPE factors of a drafter for all positions reached so far, computed in blocks and then looked up.

    Args:
        drafter ([`CoralDraftModel`])
    """

    def __init__(self, drafter: Any):
        self.drafter = drafter
        self._like = next(drafter.parameters())  # device and dtype
        self._factors: tuple[torch.Tensor, ...] = ()  # cosines and sines, [1, 1, positions, d]
        self._size = 0

    def _reserve(self, end: int) -> None:
        if end > self._size:
            self._size = -(-max(end, 2 * self._size) // _BLOCK) * _BLOCK
            positions = torch.arange(self._size, device=self._like.device)[None]
            self._factors = self.drafter.rotary(positions, self._like)

    def rows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of `count` consecutive positions, as views `[1, 1, count, d]`."""
        self._reserve(first + count)
        cosines, sines = self._factors
        return cosines[:, :, first : first + count], sines[:, :, first : first + count]

    def at(self, positions: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors `[B, 1, T, d]` of positions `[B, T]` below `end`."""
        self._reserve(end)
        cosines, sines = (factors[0, 0, positions][:, None] for factors in self._factors)
        return cosines, sines


class LevelDrafter:
    """Drafts from the last true row. Its entries in the cache are overwritten at the next step.

    Args:
        drafter ([`CoralDraftModel`]), adapter ([`TargetAdapter`]), head ([`DraftHead`]), settings ([`DraftSettings`])
        costs ([`DraftCosts`] or [`MeasuredCosts`], *optional*): for `draft_cost_aware`.
    """

    def __init__(
        self,
        drafter: Any,
        adapter: TargetAdapter,
        head: DraftHead,
        settings: DraftSettings,
        costs: AnyCosts | None = None,
    ):
        self.drafter, self.adapter, self.head, self.settings = drafter, adapter, head, settings
        parameter = next(drafter.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.costs = self.calibration = None
        self._rule: TreeSizeRule | None = None
        if settings.draft_cost_aware:
            if costs is None:
                raise ValueError("draft_cost_aware=True needs costs: pass those of costs.tables.draft_costs().")
            self.costs, self.calibration = costs, calibration_of(drafter.config)

    def rule_at(self, rows: int, context: int) -> TreeSizeRule | None:
        """The rule that sizes trees for this many rows, the longest of which has this many tokens; None: sizes are fixed."""
        if self.costs is None:
            return None
        costs = self.costs.at(rows, context)
        if self._rule is None or self._rule.costs is not costs:
            self._rule = TreeSizeRule(costs, self.settings.draft_total_tokens)
        return self._rule

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, H]` of ids `[B, T]` as the drafter reads them."""
        return placed(self.adapter.embed(ids), self.device, self.dtype)

    def draft(
        self,
        root: torch.Tensor,
        hidden: torch.Tensor,
        feature: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: DraftKeyValues,
        filled: torch.Tensor | None,
        depth: int,
        rule: TreeSizeRule | None = None,
        found: Found | None = None,
    ) -> DraftTree:
        """Drafts a tree or a chain of at most `depth` levels.

        Args:
            root (`torch.LongTensor` of shape `[B, 1]`)
            hidden (`torch.Tensor` of shape `[B, 1, H]`), feature (`torch.Tensor` of shape `[B, 1, H]`): the head input and the
                fed-back feature of the last true row.
            rotary (`tuple` of `torch.Tensor` of shape `[B or 1, 1, depth, d]`): RoPE factors for the positions of the levels.
            cache ([`DraftKeyValues`])
            filled (`torch.BoolTensor` of shape `[B, length]`, *optional*): slots that contain a true row; None: all.
            depth (`int`): at least 1.
            rule ([`TreeSizeRule`], *optional*): from [`rule_at`].
            found ([`Found`], *optional*): lookup nodes that a tree may contain as well. A chain uses none.
        """
        # one view for each level, at once
        levels = list(zip(*(factors.split(1, dim=2) for factors in rotary), strict=True))
        if self.settings.is_chain and rule is None:
            return self._chain(root, hidden, feature, levels, cache, filled, depth)
        return self._tree(root, hidden, feature, levels, cache, filled, depth, rule, found)

    def _chain(self, root, hidden, feature, levels, cache, filled, depth: int) -> DraftTree:
        tokens, mask = [root], None
        for step in range(depth):
            token = placed(self.head.argmax(hidden), root.device)  # [B, 1]
            tokens.append(token)
            if step + 1 < depth:
                if filled is not None:
                    mask = torch.nn.functional.pad(filled, (0, step + 1), value=True)[:, None, None]
                slot = cache.length + step
                hidden, feature = self.drafter.draft(self.embed(token), feature, None, cache, slot, mask, levels[step])
        return DraftTree.chain(torch.cat(tokens, dim=1))

    def _tree(
        self, root, hidden, feature, levels, cache, filled, depth: int, rule: TreeSizeRule | None, found: Found | None
    ) -> DraftTree:
        top_k, length, batch = self.settings.draft_top_k, cache.length, root.shape[0]
        if found is None or self.settings.is_chain:
            builder = DraftTreeBuilder(root, top_k, self.calibration)
        else:
            builder = GraftedTreeBuilder(root, top_k, self.calibration, *found.tensors(root.device))
        tokens, _, parent = builder.add_level(*self._children(hidden, root.device, builder))
        feature = feature.expand(batch, top_k, -1)  # of each expanded node's parent
        itself = _only_itself(top_k, batch, self.dtype, self.device)
        # added to the scores of each expanded node: the true rows and scratch slots that it sees
        seen = torch.zeros(batch, top_k, length, dtype=self.dtype, device=self.device)
        if filled is not None:
            seen = seen.masked_fill(~filled[:, None], -torch.inf)
        chosen = None
        for step in range(depth - 1):
            if rule is not None and rule.asks(builder.num_levels):
                chosen, more = self._weigh(rule, builder)
                if not more:
                    break
                chosen = None
            seen = torch.cat([seen, itself], dim=-1)  # [B, top_k, length + scratch]
            slot = length + step * top_k
            hidden, feature = self.drafter.draft(
                self.embed(tokens), feature, None, cache, slot, seen[:, None], levels[step]
            )
            tokens, _, parent = builder.add_level(*self._children(hidden, root.device, builder))
            if step + 2 < depth:
                # each new node inherits from the expanded node that is its parent
                parent = placed(parent, self.device)
                seen, feature = _rows(seen, parent), _rows(feature, parent)
        if rule is None:
            return builder.build(self.settings.draft_total_tokens)
        if chosen is None:
            chosen = (
                torch.stack(rule.best_size(rule.of_batch(builder.chances()), builder.num_levels)).flatten().tolist()
            )
        size, speed = int(chosen[0]), chosen[1]
        tree = builder.build(size)
        if self.settings.is_chain:  # one branch a node: a chain, for every attention and cache
            tree = DraftTree.chain(tree.tokens, tree.scores)
        step_ms = rule.costs.step_ms(builder.num_levels, size)
        tree.promise = DraftPromise(max(speed * step_ms - 1, 0.0), step_ms, rule.costs.target_ms[0])
        return tree

    def _children(self, hidden, device, builder: DraftTreeBuilder) -> tuple[torch.Tensor, torch.Tensor]:
        """The `top_k` most likely next tokens of each row: ids and log q, both `[B, W, top_k]`."""
        # rows that share router groups choose them by their path probabilities
        weights = None if self.head.router is None or hidden.shape[1] == 1 else builder.scores.exp()
        tokens, log_probs = self.head.top_k(hidden, self.settings.draft_top_k, weights)
        return placed(tokens, device), placed(log_probs, device)

    def _weigh(self, rule: TreeSizeRule, builder: DraftTreeBuilder) -> tuple[list[float], bool]:
        """The number of nodes of every row, tokens per millisecond, and whether another level pays. Waits for the device."""
        chances = builder.chances(), builder.open_chances, builder.parent_chances
        size, speed, more = torch.stack(rule.weigh(*chances, builder.num_levels, together=True)).flatten().tolist()
        return [size, speed], bool(more)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of `[B, W, ...]` at the indices `[B, W]`."""
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@cache
def _only_itself(count: int, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where a node of a level meets itself, -inf where it meets another, `[B, count, count]`."""
    others = ~torch.eye(count, dtype=torch.bool, device=device)
    return torch.zeros(batch, count, count, dtype=dtype, device=device).masked_fill(others, -torch.inf)


__all__ = ["LevelDrafter", "RotaryTable"]
