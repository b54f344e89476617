"""DraftStats: what speculative decoding did in one `generate` call."""

from dataclasses import dataclass, field


class _OfRows:
    """Not among the counts: `vars` of them is what the metrics take."""

    __slots__ = ("lookup_steps", "plain_steps", "rows")

    rows: list["DraftStats"]
    plain_steps: int
    lookup_steps: int


@dataclass
class DraftStats(_OfRows):
    """Acceptance statistics of one call, as `drafter.last_stats`.

    Args:
        steps (`int`): verify steps (target forwards after the prefill).
        n_accepted (`int`): drafted tokens accepted, bonus tokens excluded.
        drafted_per_depth (`list[int]`): steps that drafted to depth 1, 2, ...
        accepted_per_depth (`list[int]`): steps that accepted depth 1, 2, ...
        reached_per_depth (`list[int]`): steps that drafted to depth 1, 2, ... and accepted all depths before it. A count
            of its own: where depths differ from step to step, the other two do not tell which steps were both.

    Attributes:
        rows (`list[DraftStats]`): the same of each row of a batch, which the counts above pool: a forward over n rows is n
            steps.
        lookup_steps (`int`): how many of the steps verified continuations found in the text alone, without a draft.
        plain_steps (`int`): how many of the steps were taken without a draft, because none would have saved time.
    """

    steps: int = 0
    n_accepted: int = 0
    drafted_per_depth: list[int] = field(default_factory=list)
    accepted_per_depth: list[int] = field(default_factory=list)
    reached_per_depth: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.rows, self.plain_steps, self.lookup_steps = [], 0, 0

    def add_step(
        self, draft_depth: int, n_accepted: int, row: int = 0, plain: bool = False, lookup: bool = False
    ) -> None:
        """Records one verify step (of a row of the batch) that drafted to `draft_depth` and accepted `n_accepted`."""
        if self.rows:
            self.rows[row].add_step(draft_depth, n_accepted, plain=plain, lookup=lookup)
        self.steps += 1
        self.plain_steps += plain
        self.lookup_steps += lookup
        self.n_accepted += n_accepted
        depths = {
            "drafted_per_depth": draft_depth,
            "accepted_per_depth": n_accepted,
            "reached_per_depth": min(draft_depth, n_accepted + 1),
        }
        for name, last in depths.items():
            counts = getattr(self, name)
            counts.extend([0] * (max(depths.values()) - len(counts)))
            for depth in range(last):
                counts[depth] += 1

    def merge(self, other: "DraftStats") -> "DraftStats":
        """Pools two runs, without their rows (tau is always pooled over steps, never averaged over samples)."""
        merged = DraftStats(self.steps + other.steps, self.n_accepted + other.n_accepted)
        merged.plain_steps = self.plain_steps + other.plain_steps
        merged.lookup_steps = self.lookup_steps + other.lookup_steps
        for name in ("drafted_per_depth", "accepted_per_depth", "reached_per_depth"):
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
        counts = zip(self.accepted_per_depth, self.reached_per_depth, strict=True)
        return [accepted / reached if reached else 0.0 for accepted, reached in counts]


__all__ = ["DraftStats"]
