"""Acceptance statistics of simulated greedy chains, from teacher-forced matches."""

from typing import Any

import torch


class ChainStatistics:
    """Counts what a greedy chain of `depth` drafts would have had accepted.

    Step k's match at row r is what the k-th draft of a chain that starts at row r-(k-1) would see, because rollout
    inputs are exactly those of generation as long as everything before was accepted.

    Args:
        depth (`int`): length of the chain.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.reached = torch.zeros(depth, dtype=torch.float64)
        self.accepted = torch.zeros(depth, dtype=torch.float64)
        self.tokens = torch.zeros(2, dtype=torch.float64)  # produced, target forwards

    def add(self, matches: torch.BoolTensor, trained: torch.BoolTensor) -> None:
        """Adds a batch.

        Args:
            matches (`torch.BoolTensor` of shape `[depth, B, S]`): step k's argmax at a row is the target's.
            trained (`torch.BoolTensor` of shape `[B, S]`): rows that predict a response token.
        """
        # run[r]: drafts accepted by a chain that starts at row r
        alive = trained
        run = torch.zeros(trained.shape, dtype=torch.long)
        for step in range(self.depth):
            here = _advance(trained, step)
            reached = alive & here
            alive = reached & _advance(matches[step], step)
            self.reached[step] += reached.sum()
            self.accepted[step] += alive.sum()
            run += alive
        for lengths, rows in zip(run.tolist(), trained.tolist(), strict=True):
            row = 0
            while row < len(rows):
                if not rows[row]:
                    row += 1
                    continue
                produced = lengths[row] + 1
                self.tokens += torch.tensor([produced, 1.0], dtype=torch.float64)
                row += produced

    def reduce(self, accelerator: Any) -> None:
        """Sums the counts over all processes."""
        for name in ("reached", "accepted", "tokens"):
            value = getattr(self, name).to(accelerator.device)
            setattr(self, name, accelerator.reduce(value, "sum").cpu())

    def summary(self) -> dict[str, float]:
        """`acceptance_k` (conditional on reaching depth k) and `acceptance_length` (tau, pooled, bonus included)."""
        rates = (self.accepted / self.reached.clamp(min=1)).tolist()
        summary = {f"acceptance_{step}": rate for step, rate in enumerate(rates, start=1)}
        summary["acceptance_length"] = (self.tokens[0] / self.tokens[1].clamp(min=1)).item()
        return summary


def _advance(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`out[..., r] = rows[..., r + count]`, False past the end."""
    if count == 0:
        return rows
    moved = torch.zeros_like(rows)
    moved[..., :-count] = rows[..., count:]
    return moved
