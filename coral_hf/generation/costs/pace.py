"""Whether a step drafts at all: where drafting loses time, plain steps are taken, and now and then it is tried again."""

from typing import Protocol

from ..draft_tree import DraftPromise
from ..tree_size import DraftCosts


class AnyCosts(Protocol):
    """What knows the costs of a step."""

    def at(self, rows: int, context: int) -> DraftCosts:
        """Those of this many rows, the longest of which has this many tokens."""
        ...


# In plain steps' time: what drafting may lose before it pauses, at first and when it is tried again, and what it may save up.
FIRST_CREDIT, LATER_CREDIT, MOST_CREDIT = 1.0, 0.25, 2.0
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 128  # plain steps in a row; each pause is twice as long as the one before
PRIOR = 2.0  # accepted tokens for which the promises are taken at their word


class Pace:
    """Decides before every step of a call whether it drafts.

    Drafting has a credit of time. A step adds what it saves over the plain steps that would have given its tokens, or takes
    what it loses. When the credit is used up, plain steps follow. So a call loses a bounded time to drafts, whatever the
    drafter is worth: the first credit, and a small one for each look after a pause.

    The tokens of a step are those that its rule promised, corrected by what the call's promises were worth so far: what was
    accepted by chance in one step decides nothing.
    """

    def __init__(self) -> None:
        self._credit = FIRST_CREDIT
        self._pause, self._plain_left = SHORTEST_PAUSE, 0
        self._promised = self._accepted = PRIOR

    def drafts(self, costs: DraftCosts | None) -> bool:
        """Whether the next step drafts.

        Args:
            costs ([`DraftCosts`], *optional*): of the step; None: sizes are fixed, and every step drafts.
        """
        if costs is None:
            return True
        if self._plain_left:
            self._plain_left -= 1
            return False
        return costs.can_pay

    def add(self, promise: DraftPromise | None, accepted: float) -> None:
        """Takes account of a step that drafted.

        Args:
            promise ([`DraftPromise`], *optional*): of its tree; None: its size was fixed.
            accepted (`float`): drafted tokens accepted in each row, on average.
        """
        if promise is None:
            return
        self._promised += promise.accepted
        self._accepted += accepted
        expected = promise.accepted * self._accepted / self._promised
        self._credit += expected + 1 - promise.step_ms / max(promise.plain_ms, 1e-9)
        if self._credit < 0:
            self._plain_left, self._credit = self._pause, LATER_CREDIT
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self._credit >= FIRST_CREDIT:
            self._credit, self._pause = min(self._credit, MOST_CREDIT), SHORTEST_PAUSE


__all__ = ["AnyCosts", "Pace"]
