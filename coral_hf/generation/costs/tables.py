"""Costs at any batch size and context, interpolated between a few that were measured."""

import time

from transformers import PreTrainedModel

from ...drafter.modeling_coral import CoralDraftModel
from ..key_values.paths import target_obstacle
from ..settings import DraftSettings
from ..tree_size import DraftCosts
from .measurement import LONGEST_SECONDS, cost_table, costs_key, prefix_length


GROWTH = 4  # ratio of neighbouring measured contexts
MOST_TOKENS = 8192  # most tokens in the cache of a measurement; longer contexts are extrapolated
BLOCK = 128  # tokens of context that share one table


class MeasuredCosts:
    """The costs of one call, looked up or measured when a step first needs them.

    Batch sizes are measured at powers of two. Contexts are measured at that of an ordinary chat and at each further factor
    of four. A size is measured when a call comes closer to it than to the one before. Times between measured sizes are
    interpolated linearly, because attention grows with the context and matrix products grow with the rows. Longer contexts
    are extrapolated.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        seconds (`float`): upper limit for all measurements of the call.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: CoralDraftModel,
        settings: DraftSettings,
        seconds: float = LONGEST_SECONDS,
    ):
        self.pair = target, drafter, settings
        self.key = costs_key(target, drafter, settings)
        self.usual = prefix_length(target, settings)
        self.in_store = target_obstacle(target) is None
        positions = getattr(target.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
        self.longest = min(positions - settings.draft_total_tokens - settings.draft_depth, MOST_TOKENS)
        self.seconds = self.seconds_left = seconds
        self._tables: dict[tuple[int, int], DraftCosts | None] = {}  # by rows and context; None: unavailable
        self._at: dict[tuple[int, int], DraftCosts] = {}

    def at(self, rows: int, context: int) -> DraftCosts:
        """The costs of a step with this many rows, the longest of which has this many tokens."""
        place = rows, context // BLOCK
        if place not in self._at:
            middle = place[1] * BLOCK + BLOCK // 2
            self._at[place] = self._between_rows(rows, middle)
        return self._at[place]

    def _between_rows(self, rows: int, context: int) -> DraftCosts:
        upper = 1 << (rows - 1).bit_length()
        found = self._of_rows(upper, context, needed=True)
        if upper == rows or (lower := self._of_rows(upper // 2, context, needed=False)) is None:
            return found or self._nearest(upper, context)
        if found is None:
            return lower
        return mixed(lower, found, (rows - upper // 2) / (upper - upper // 2))

    def _of_rows(self, rows: int, context: int, needed: bool) -> DraftCosts | None:
        """The costs for this many rows, interpolated between contexts; None if nothing is known for these rows."""
        contexts = self._contexts(rows)
        nearest = min(contexts, key=lambda other: max(other, context) / min(other, context))
        known = {}
        for place in contexts:
            table = self._table(rows, place, measure=needed and place == nearest)
            if table is not None:
                known[place] = table
        below = [place for place in known if place <= context]
        above = [place for place in known if place > context]
        if not below or (not above and len(below) == 1):
            return next(iter(known.values()), None) if not below else known[below[0]]
        first, second = (below[-1], above[0]) if above else below[-2:]
        return mixed(known[first], known[second], (context - first) / (second - first))

    def _nearest(self, rows: int, context: int) -> DraftCosts:
        """The costs of another batch size, preferably a larger one, for when the time for measuring is over."""
        sizes = {known for (known, _), table in self._tables.items() if table is not None}
        larger = [size for size in sizes if size > rows]
        found = self._of_rows(min(larger) if larger else max(sizes), context, needed=False)
        assert found is not None
        return found

    def _contexts(self, rows: int) -> list[int]:
        """The contexts at which costs for this many rows are measured, in ascending order."""
        contexts = [min(self.usual, max(MOST_TOKENS // rows, 8))]
        while (
            self.in_store and (following := contexts[-1] * GROWTH) * rows <= MOST_TOKENS and following <= self.longest
        ):
            contexts.append(following)
        return contexts

    def _table(self, rows: int, context: int, measure: bool) -> DraftCosts | None:
        place = rows, context
        if self._tables.get(place) is None and (measure or place not in self._tables):
            began = time.monotonic()
            # the first table of a call is always measured
            first = not any(self._tables.values())
            seconds = (self.seconds if first else max(self.seconds_left, 0.0)) if measure else 0.0
            self._tables[place] = cost_table(
                *self.pair, rows=rows, context=context, seconds=seconds if seconds >= 1 else 0.0, key=self.key
            )
            self.seconds_left -= time.monotonic() - began
        return self._tables[place]


def mixed(first: DraftCosts, second: DraftCosts, share: float) -> DraftCosts:
    """Linear interpolation: `first` at 0 and `second` at 1. Beyond 1 the result is never less than `second`."""

    def between(one: float, other: float) -> float:
        value = one + share * (other - one)
        return max(value, other) if share > 1 else value

    return DraftCosts(
        tuple(between(*times) for times in zip(first.target_ms, second.target_ms, strict=True)),
        between(first.first_level_ms, second.first_level_ms),
        between(first.level_ms, second.level_ms),
    )


def draft_costs(
    target: PreTrainedModel, drafter: CoralDraftModel, settings: DraftSettings, seconds: float = LONGEST_SECONDS
) -> MeasuredCosts:
    """The costs of a call with these settings, not measured yet. Measurements take at most this many seconds."""
    return MeasuredCosts(target, drafter, settings, seconds)


__all__ = ["MeasuredCosts", "draft_costs", "mixed"]
