"""Decides whether a step drafts. If drafting loses time, plain steps follow, and drafting is tried again later."""

from typing import Protocol

from ..draft_tree import DraftPromise
from ..tree_size import DraftCosts


class AnyCosts(Protocol):
    """A source of step costs."""

    def at(self, rows: int, context: int) -> DraftCosts:
        """The costs of a step with this many rows, the longest of which has this many tokens."""
        ...


# In units of a plain step's time: the loss at which drafting first pauses, the same for later tries, and the most credit.
FIRST_CREDIT, LATER_CREDIT, MOST_CREDIT = 1.0, 0.25, 2.0
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 128  # plain steps; each pause is twice as long as the last
PRIOR = 2.0  # weight of the promises themselves, in accepted tokens


class Pace:
    """Decides before every step of a call whether it drafts.

    Drafting has a time credit. A step that saves time over plain steps adds to it, and a step that loses time takes from it.
    When the credit is used up, plain steps follow. The time that a call can lose is therefore bounded for any drafter: by
    the first credit, plus a small one for each try after a pause.

    The gain of a step is computed from the tokens that its rule promised, scaled by how well the promises of this call have
    come true. The outcome of a single step has little weight.
    """

    def __init__(self) -> None:
        self._credit = FIRST_CREDIT
        self._pause, self._plain_left = SHORTEST_PAUSE, 0
        self._promised = self._accepted = PRIOR

    def drafts(self, costs: DraftCosts | None) -> bool:
        """Whether the next step drafts.

        Args:
            costs ([`DraftCosts`], *optional*): costs of the step; None: sizes are fixed and every step drafts.
        """
        if costs is None:
            return True
        if self._plain_left:
            self._plain_left -= 1
            return False
        return costs.can_pay

    def add(self, promise: DraftPromise | None, accepted: float) -> None:
        """Records a step that drafted.

        Args:
            promise ([`DraftPromise`], *optional*): the promise of its tree; None: its size was fixed.
            accepted (`float`): accepted drafted tokens per row, on average.
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
