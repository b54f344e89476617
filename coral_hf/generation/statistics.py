"""DraftStats: what speculative decoding did in one `generate` call."""

from dataclasses import dataclass, field


@dataclass
class DraftStats:
    """Acceptance statistics of one call, as `drafter.last_stats`.

    Args:
        steps (`int`): verify steps (target forwards after the prefill).
        n_accepted (`int`): drafted tokens accepted, bonus tokens excluded.
        drafted_per_depth (`list[int]`): steps that drafted to depth 1, 2, ...
        accepted_per_depth (`list[int]`): steps that accepted depth 1, 2, ...
    """

    steps: int = 0
    n_accepted: int = 0
    drafted_per_depth: list[int] = field(default_factory=list)
    accepted_per_depth: list[int] = field(default_factory=list)

    def add_step(self, draft_depth: int, n_accepted: int) -> None:
        """Records one verify step that drafted to `draft_depth` and accepted `n_accepted`."""
        self.steps += 1
        self.n_accepted += n_accepted
        for counts, reached in ((self.drafted_per_depth, draft_depth), (self.accepted_per_depth, n_accepted)):
            counts.extend([0] * (max(draft_depth, n_accepted) - len(counts)))
            for depth in range(reached):
                counts[depth] += 1

    def merge(self, other: "DraftStats") -> "DraftStats":
        """Pools two runs (tau is always pooled over steps, never averaged over samples)."""
        merged = DraftStats(self.steps + other.steps, self.n_accepted + other.n_accepted)
        for name in ("drafted_per_depth", "accepted_per_depth"):
            mine, theirs = getattr(self, name), getattr(other, name)
            length = max(len(mine), len(theirs))
            padded = [counts + [0] * (length - len(counts)) for counts in (mine, theirs)]
            setattr(merged, name, [a + b for a, b in zip(*padded, strict=True)])
        return merged

    @property
    def acceptance_length(self) -> float:
        """tau = 1 + accepted / verify steps: tokens per target forward, bonus included."""
        return 1.0 + self.n_accepted / self.steps if self.steps else 1.0

    @property
    def acceptance_per_depth(self) -> list[float]:
        """Conditional acceptance: of the steps that accepted depth k - 1 and drafted depth k, how many accepted k."""
        reached = [self.steps, *self.accepted_per_depth]
        return [
            accepted / min(before, drafted) if min(before, drafted) else 0.0
            for accepted, before, drafted in zip(
                self.accepted_per_depth, reached, self.drafted_per_depth, strict=False
            )
        ]


__all__ = ["DraftStats"]
