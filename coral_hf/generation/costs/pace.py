"""Decides whether a step drafts. If drafting loses time, plain steps follow, and drafting is tried again later."""

import math
from collections.abc import Callable
from typing import Protocol

from ..draft_tree import DraftPromise
from ..tree_size import DraftCosts
from .step_times import StepTimes


class AnyCosts(Protocol):
    """A source of step costs."""

    def at(self, rows: int, context: int) -> DraftCosts:
        """The costs of a step with this many rows, the longest of which has this many tokens."""
        ...


# In units of a plain step's time: the loss at which drafting first pauses, the same for later tries, and the most credit.
FIRST_CREDIT, LATER_CREDIT, MOST_CREDIT = 1.0, 0.25, 2.0
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 128  # plain steps; each pause is twice as long as the last
PRIOR = 2.0  # weight of the promises themselves, in accepted tokens
MARGIN = 0.03  # by which drafting must be faster where steps are timed, because times are noisy
LOST_SHARE = 0.01  # a pause lasts until the time lost before it is at most this share
LONGEST_TIMED_PAUSE = 2048  # plain steps, for pauses that follow a measured loss


class Pace:
    """Decides before every step of a call whether it drafts.

    Drafting has a time credit. A step that saves time over plain steps adds to it, and a step that loses time takes from it.
    When the credit is used up, plain steps follow. The time that a call can lose is therefore bounded for any drafter: by
    the first credit, plus a small one for each try after a pause.

    The gain of a step is computed from the tokens that its rule promised, scaled by how well the promises of this call have
    come true. The outcome of a single step has little weight.

    With a clock, the promised time of a drafted step is corrected too. The correction compares the actual times of drafted
    and plain steps with their costs ([`StepTimes`]). Drafting then has to be faster by [`MARGIN`].

    Args:
        clock (`Callable`, *optional*): returns seconds. None: steps are not timed, so that decisions depend only on the costs
            and the tokens, and equal seeds draw equal samples.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._credit = FIRST_CREDIT
        self._pause, self._plain_left = SHORTEST_PAUSE, 0
        self._promised = self._accepted = PRIOR
        self._times = None if clock is None else StepTimes(clock)
        self._lost = 0.0  # measured since the last pause, in plain steps

    def drafts(self, costs: DraftCosts | None) -> bool:
        """Whether the next step drafts. The step begins now.

        Args:
            costs ([`DraftCosts`], *optional*): costs of the step; None: sizes are fixed and every step drafts.
        """
        if costs is None:
            return True
        if self._times is not None:
            self._times.begin(costs.target_ms[0])
        if self._plain_left:
            self._plain_left -= 1
            return False
        return costs.can_pay and not (self._times is not None and self._times.plain_is_due)

    def add(self, promise: DraftPromise | None, accepted: float) -> None:
        """Records a step, which ends now.

        Args:
            promise ([`DraftPromise`], *optional*): the promise of its tree; None: it was plain, or its size was fixed.
            accepted (`float`): accepted drafted tokens per row, on average.
        """
        correction, margin, decided = 1.0, 0.0, True
        if self._times is not None:
            took = self._times.end(None if promise is None else promise.step_ms)
            correction, margin, decided = self._times.correction, MARGIN, self._times.enough
            if promise is not None and took is not None:
                self._lost += took - 1 - accepted
        if promise is None:
            return
        self._promised += promise.accepted
        self._accepted += accepted
        expected = promise.accepted * self._accepted / self._promised
        step = correction * promise.step_ms / max(promise.plain_ms, 1e-9)
        self._credit += expected + 1 - step * (1 + margin)
        if self._credit < 0 and decided:
            if self._times is not None:
                self._times.pause()
            repaid = min(math.ceil(self._lost / LOST_SHARE), LONGEST_TIMED_PAUSE)
            self._plain_left, self._credit, self._lost = max(self._pause, repaid), LATER_CREDIT, 0.0
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self._credit >= FIRST_CREDIT:
            self._credit, self._pause = min(self._credit, MOST_CREDIT), SHORTEST_PAUSE


__all__ = ["AnyCosts", "Pace"]
