"""DraftStats: what speculative decoding did in one `generate` call."""

from dataclasses import dataclass, field


class _OfRows:
    """Excluded from the counts, because the metrics use `vars` of the counts."""

    __slots__ = ("lookup_steps", "plain_steps", "rows")

    rows: list["DraftStats"]
    plain_steps: int
    lookup_steps: int


@dataclass
class DraftStats(_OfRows):
    """Acceptance statistics of one call, as `drafter.last_stats`.

    Args:
        steps (`int`): verification steps (target forward passes after the prefill).
        n_accepted (`int`): accepted drafted tokens, without bonus tokens.
        drafted_per_depth (`list[int]`): steps that drafted to depth 1, 2, ...
        accepted_per_depth (`list[int]`): steps that accepted depth 1, 2, ...
        reached_per_depth (`list[int]`): steps that drafted to depth 1, 2, ... and accepted all depths before it. If depths
            differ between steps, this does not follow from the other two counts.

    Attributes:
        rows (`list[DraftStats]`): the statistics of each row of a batch. The counts above pool the rows: a forward pass over
            n rows counts as n steps.
        lookup_steps (`int`): number of steps that only verified continuations found in the text, without a draft.
        plain_steps (`int`): number of steps without a draft, because no draft would have saved time.
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
        """Records one verification step of one row that drafted to `draft_depth` and accepted `n_accepted`."""
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
        """Pools two runs without their rows. Tau is always pooled over steps, never averaged over samples."""
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
        """tau = 1 + accepted / verification steps: tokens per target forward pass, including the bonus token."""
        return 1.0 + self.n_accepted / self.steps if self.steps else 1.0

    @property
    def acceptance_per_depth(self) -> list[float]:
        """Conditional acceptance: the share of steps that accepted depth k among those that accepted k - 1 and drafted k."""
        counts = zip(self.accepted_per_depth, self.reached_per_depth, strict=True)
        return [accepted / reached if reached else 0.0 for accepted, reached in counts]


__all__ = ["DraftStats"]
