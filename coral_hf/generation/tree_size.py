"""Cost-aware draft sizes: measured costs, calibrated path probabilities, and the rule that combines them.

This module works on plain tensors. `costs/measurement.py` measures the times in [`DraftCosts`].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..drafter.configuration_coral import CALIBRATION_KNOTS


@dataclass(frozen=True)
class DraftCosts:
    """What a step costs on one machine, in milliseconds.

    Args:
        target_ms (`tuple[float, ...]`): T(n) for n = 1, 2, ... nodes: the target's forward pass and the work that follows.
            It never decreases, but it is not convex, because matmuls work in blocks.
        first_level_ms (`float`): time to draft one level, including the new true rows.
        level_ms (`float`): time of each further level.
    """

    target_ms: tuple[float, ...]
    first_level_ms: float
    level_ms: float

    def __post_init__(self):
        times = [*self.target_ms, self.first_level_ms, self.level_ms]
        if not self.target_ms or not all(isinstance(time, int | float) and 0 <= time < 1e9 for time in times):
            raise ValueError(
                f"{self} is not a table of times: target_ms must contain at least one number of milliseconds, and no time may be "
                "negative. Measure again with `coral-hf tune`."
            )

    def drafting_ms(self, levels: int) -> float:
        """Time to draft this many levels, at least one."""
        return self.first_level_ms + (levels - 1) * self.level_ms

    def step_ms(self, levels: int, nodes: int) -> float:
        """Time of a whole step: drafting, then verifying `nodes` nodes including the root."""
        return self.drafting_ms(levels) + self.target_ms[nodes - 1]

    def at(self, rows: int, context: int) -> "DraftCosts":
        """These costs for any batch size and context. [`MeasuredCosts`] distinguishes them."""
        return self

    @cached_property
    def can_pay(self) -> bool:
        """Whether a chain of any length would save time if it were fully accepted."""
        return any(
            (levels + 1) * self.target_ms[0] > self.step_ms(levels, levels + 1)
            for levels in range(1, len(self.target_ms))
        )


@dataclass(frozen=True)
class Calibration:
    """Path probabilities -> chances of acceptance: one monotone, piecewise linear map per depth.

    Args:
        rows (`Sequence[Sequence[float]]`): see `CoralDraftConfig.draft_calibration`.
    """

    rows: Sequence[Sequence[float]]

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return {}

    def _tables_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The knots between two pieces; each piece's value at 0 and its slope, `[depths, pieces]`."""
        # Copied to the device once, not at every level of every tree. Lines need a third of the operations of a lerp.
        if device not in self._tables:
            knots, rows = torch.tensor(CALIBRATION_KNOTS).double(), torch.tensor(self.rows).double()
            slopes = rows.diff(dim=1) / knots.diff()
            tables = knots[1:-1], rows[:, :-1] - slopes * knots[:-1], slopes
            between, starts, slopes = (table.float().to(device) for table in tables)
            self._tables[device] = between, starts, slopes
        return self._tables[device]

    def __call__(self, probabilities: torch.Tensor, depth: int) -> torch.Tensor:
        """Path probabilities of nodes at `depth` (1: below the root) -> chances of acceptance, of the same shape."""
        between, starts, slopes = self._tables_on(probabilities.device)
        row = min(depth, len(starts)) - 1
        piece = torch.bucketize(probabilities, between)
        return torch.addcmul(starts[row][piece], slopes[row][piece], probabilities).clamp(min=0)

    @classmethod
    def fit(cls, probabilities: Sequence[torch.Tensor], accepted: Sequence[torch.Tensor]) -> "Calibration":
        """Least squares on the knots, regularised towards the identity for sparse data, then made monotone.

        Args:
            probabilities (`list[torch.Tensor]`): path probabilities `[M]` of drafted nodes, one tensor per depth.
            accepted (`list[torch.BoolTensor]`): whether the target accepted them.
        """
        knots = torch.tensor(CALIBRATION_KNOTS, dtype=torch.float64)
        rows = []
        for drafted, right in zip(probabilities, accepted, strict=True):
            hats = _hat_functions(drafted.double(), knots)  # [M, knots]
            # as if every knot had been observed a few times with its drafted probability
            prior = 4.0 * torch.eye(len(knots), dtype=torch.float64)
            values = torch.linalg.solve(hats.T @ hats + prior, hats.T @ right.double() + prior @ knots)
            weights = hats.sum(dim=0) + 4.0
            rows.append([round(min(max(value, 0.0), 1.0), 4) for value in isotonic(values.tolist(), weights.tolist())])
        return cls(rows)


def _hat_functions(values: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Weights `[M, knots]` of `[M]` values on the knots. The weights of the two neighbouring knots sum to one."""
    right = torch.bucketize(values, knots).clamp(1, len(knots) - 1)
    share = ((values - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
    hats = torch.zeros(len(values), len(knots), dtype=values.dtype)
    hats.scatter_(1, right[:, None] - 1, 1 - share[:, None])
    return hats.scatter_(1, right[:, None], share[:, None])


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The non-decreasing sequence closest to `values` (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight, length = blocks.pop()
            left = blocks[-1]
            total = left[1] + weight
            blocks[-1] = [(left[0] * left[1] + mean * weight) / total, total, left[2] + length]
    return [mean for mean, _, length in blocks for _ in range(int(length))]


class TreeSizeRule:
    """Chooses the depth and the size of a tree that pay best, while it is drafted.

    The best n nodes are expected to give 1 + the sum of the best n - 1 chances of acceptance, in tokens. They cost the
    drafting time so far plus T(n). The n with the best ratio of tokens to time is verified. Another level is drafted while it
    promises a better ratio. Nothing is drawn at random, so the output stays the same as plain `generate`'s.

    Args:
        costs ([`DraftCosts`]): costs up to at least the largest tree.
        total_tokens (`int`): nodes of the largest tree, including the root.
    """

    def __init__(self, costs: DraftCosts, total_tokens: int):
        if len(costs.target_ms) < total_tokens:
            raise ValueError(
                f"Costs are known for trees of up to {len(costs.target_ms)} nodes, but draft_total_tokens={total_tokens}. "
                "Measure them again with `coral-hf tune`."
            )
        self.costs = costs
        self.total_tokens = total_tokens
        self._target_ms: dict[torch.device, torch.Tensor] = {}

    def _target_ms_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._target_ms:
            self._target_ms[device] = torch.tensor(self.costs.target_ms[: self.total_tokens], device=device)
        return self._target_ms[device]

    def best_size(self, chances: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The size that pays best after drafting `levels` levels.

        Args:
            chances (`torch.Tensor` of shape `[B, M]`): chances of the stored nodes without the root, in any order.
            levels (`int`)

        Returns:
            `tuple`: nodes to verify, including the root, and tokens expected per millisecond, both `[B]`.
        """
        best = chances.sort(dim=1, descending=True).values[:, : self.total_tokens - 1]
        tokens = torch.cat([torch.ones_like(best[:, :1]), best], dim=1).cumsum(dim=1)  # [B, sizes]
        times = self._target_ms_on(tokens.device)[: tokens.shape[1]] + self.costs.drafting_ms(levels)
        speed, size = (tokens / times).max(dim=1)
        return size + 1, speed

    def repays_level(
        self, chances: torch.Tensor, open_chances: torch.Tensor, parent_chances: torch.Tensor, levels: int
    ) -> torch.Tensor:
        """Whether a further level promises more tokens per millisecond.

        The children of the open nodes are not known yet. The ratio of a child's chance to its parent's is expected to be the
        same as for the best open nodes.

        Args:
            chances (`torch.Tensor` of shape `[B, M]`): chances of the stored nodes without the root.
            open_chances (`torch.Tensor` of shape `[B, W]`): chances of the nodes that the next level would expand.
            parent_chances (`torch.Tensor` of shape `[B, W]`): chances of the parents of those nodes.
            levels (`int`): levels drafted so far.

        Returns:
            `torch.BoolTensor` of shape `[B]`.
        """
        return self.weigh(chances, open_chances, parent_chances, levels)[2]

    def weigh(
        self,
        chances: torch.Tensor,
        open_chances: torch.Tensor,
        parent_chances: torch.Tensor,
        levels: int,
        together: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The size that pays best now, and whether a further level pays.

        Args:
            chances, open_chances, parent_chances, levels: as for [`repays_level`].
            together (`bool`): the rows are a batch that one forward pass verifies ([`of_batch`]).

        Returns:
            `tuple`: nodes and tokens per millisecond, as from [`best_size`], and whether a further level promises more. Each
            has shape `[B]`, or `[1]` for a batch.
        """
        kept = (open_chances[:, :1] / parent_chances[:, :1].clamp(min=1e-9)).clamp(max=1)  # [B, 1]
        expected = torch.cat([chances, open_chances * kept], dim=1)
        if together:
            chances, expected = self.of_batch(chances), self.of_batch(expected)
        size, speed = self.best_size(chances, levels)
        return size, speed, self.best_size(expected, levels + 1)[1] > speed

    @staticmethod
    def of_batch(chances: torch.Tensor) -> torch.Tensor:
        """Chances `[B, M]` of a batch -> `[1, M]`: the tokens per row that the n-th best node of every row adds.

        A forward pass pads all trees of a batch to the largest, so that one more node in one row costs as much as one more in every
        row. All rows therefore get the same number of nodes, each row its most likely ones. The number is the one that pays best for
        all rows together. Unequal rows were measured and gave fewer tokens: 2.41 per step at 6.6 padded nodes per row, compared with
        2.70 for 6.6 nodes in every row (docs/batches.md).
        """
        if len(chances) == 1:
            return chances
        return chances.sort(dim=1, descending=True).values.mean(dim=0, keepdim=True)

    @staticmethod
    def asks(levels: int) -> bool:
        """Whether to decide about another level after this many levels: after every second one, because the host waits."""
        return levels % 2 == 1


def smooth_times(measured: dict[int, float], count: int) -> tuple[float, ...]:
    """Times at some sizes -> times at 1..count: made monotone and interpolated linearly.

    Raises:
        ValueError: if size 1 or `count` was not measured.
    """
    sizes = sorted(measured)
    if not sizes or sizes[0] != 1 or sizes[-1] < count:
        raise ValueError(f"Times were measured at {sizes}, but are needed from 1 to {count} nodes: measure both.")
    values = isotonic([measured[size] for size in sizes])
    times, place = [], 0
    for size in range(1, count + 1):
        while sizes[place] < size:
            place += 1
        if sizes[place] == size:
            times.append(values[place])
        else:
            left, right = sizes[place - 1], sizes[place]
            share = (size - left) / (right - left)
            times.append(values[place - 1] + share * (values[place] - values[place - 1]))
    return tuple(times)


def chain_depth(config: Any) -> int:
    """The fixed length, up to the drafter's depth, at which a chain pays most according to the drafter's calibration.

    The machine's times are unknown here. A token is assumed to cost the weights that are read for it, as in memory-bound
    decoding. Drafted probabilities are assumed to be uniform: if each token of a chain has probability p, the d-th has the path
    probability p^d, and its calibrated chance is averaged over p.

    Args:
        config ([`CoralDraftConfig`])
    """
    calibration = calibration_of(config)
    layer = config.hidden_size * (
        2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads) + 3 * config.intermediate_size
    )
    head = config.hidden_size * config.vocab_size
    drafted = layer + config.hidden_size * (config.draft_vocab_size or config.vocab_size)
    share = drafted / (
        (config.target_num_hidden_layers or 1) * layer + head
    )  # cost of a draft step relative to the target's forward pass
    probabilities = (torch.arange(1000) + 0.5) / 1000
    tokens, best, depth = 1.0, 0.0, 1
    for level in range(1, config.draft_depth + 1):
        chances = probabilities**level
        tokens += float((chances if calibration is None else calibration(chances, level)).mean())
        if (speed := tokens / (1 + level * share)) > best:
            best, depth = speed, level
    return depth


def calibration_of(config: Any) -> Calibration | None:
    """The drafter's calibration; None if it has none. Drafters of other code may lack the setting."""
    rows = getattr(config, "draft_calibration", None)
    return Calibration(rows) if rows else None


__all__ = ["Calibration", "DraftCosts", "TreeSizeRule", "calibration_of", "chain_depth", "isotonic", "smooth_times"]
