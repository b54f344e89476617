"""Acceptance statistics of simulated greedy chains, from teacher-forced matches."""

from typing import Any

import torch


class ChainStatistics:
    """Counts the drafts of a greedy chain of length `depth` that would have been accepted.

    Step k's match at row r equals the match of the k-th draft in a chain that starts at row r-(k-1), because rollout inputs
    are exactly those of generation while all drafts before were accepted. On greedy responses of the target, tau therefore
    equals that of `generate` with a chain of `depth`.

    Args:
        depth (`int`): length of the chain.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.reached = torch.zeros(depth, dtype=torch.float64)
        self.accepted = torch.zeros(depth, dtype=torch.float64)
        self.tokens = torch.zeros(2, dtype=torch.float64)  # produced, target forwards

    def add(self, matches: torch.Tensor, trained: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            matches (`torch.BoolTensor` of shape `[depth, B, S]`): whether step k's argmax at a row equals the target's.
            trained (`torch.BoolTensor` of shape `[B, S]`): rows that predict a response token.
        """
        # run[r]: accepted drafts of a chain that starts at row r
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
            for start, end in _segments(rows):
                # The response's first token comes from the prefill, without a draft.
                row = start + 1
                while row < end:
                    # The last drafts stop at the end of the response, without a bonus token.
                    produced = min(lengths[row] + 1, end - row)
                    self.tokens += torch.tensor([produced, 1.0], dtype=torch.float64)
                    row += produced

    def reduce(self, accelerator: Any) -> None:
        """Sums the counts over all processes."""
        for name in ("reached", "accepted", "tokens"):
            value = getattr(self, name).to(accelerator.device)
            setattr(self, name, accelerator.reduce(value, "sum").cpu())

    def summary(self) -> dict[str, float]:
        """`acceptance_k` (conditional on reaching depth k) and `acceptance_length` (tau, pooled, with the bonus token)."""
        rates = (self.accepted / self.reached.clamp(min=1)).tolist()
        summary = {f"acceptance_{step}": rate for step, rate in enumerate(rates, start=1)}
        summary["acceptance_length"] = (self.tokens[0] / self.tokens[1].clamp(min=1)).item()
        return summary


def conditional_acceptance(
    match: torch.Tensor, places: torch.Tensor, valid: list[torch.Tensor], trained: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Acceptance of each rollout step, given that the chain before it was accepted.

    Args:
        match (`torch.BoolTensor` of shape `[K, M]`): whether step k's argmax equals the target's.
        places (`torch.LongTensor` of shape `[M]`): indices of these rows in the flattened batch.
        valid (`list` of `torch.BoolTensor` of shape `[B, S]`): rows of each step that have a chain before them.
        trained (`torch.BoolTensor` of shape `[B, S]`): rows that predict a response token.

    Returns:
        `list` of `tuple`: for each step, the rate and its number of rows.
    """
    rates, alive = [], trained
    for step, here in enumerate(match):
        whole = torch.zeros_like(trained).flatten()
        whole[places] = here
        reached = trained & valid[step] & (alive if step == 0 else alive.roll(1, dims=1))
        alive = reached & whole.view_as(trained)
        rates.append((alive.sum() / reached.sum().clamp(min=1), reached.sum()))
    return rates


def _segments(rows: list[bool]) -> list[tuple[int, int]]:
    """Runs of True in a list, as (start, end). These are the responses of a conversation."""
    edges = [i for i, (before, here) in enumerate(zip([False, *rows], [*rows, False], strict=True)) if before != here]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _advance(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`out[..., r] = rows[..., r + count]`, False past the end."""
    if count == 0:
        return rows
    moved = torch.zeros_like(rows)
    moved[..., : max(rows.shape[-1] - count, 0)] = rows[..., count:]
    return moved
