"""Actual times of whole steps. They correct measured costs, which contain forward passes only."""

import statistics
from collections import deque
from collections.abc import Callable


PLAIN_WINDOW, DRAFTED_WINDOW = 5, 15  # latest steps that count
OUTLIER = 1.5  # a step counts at most this many times the median
FEWEST = 2  # drafted steps that are timed before a decision to pause
FIRST_DRAFTS, MOST_DRAFTS = 4, 32  # drafted steps between two plain ones: at first, doubled each time, and later


class StepTimes:
    """Compares the actual times of plain and drafted steps with their costs.

    A step takes longer than the forward passes in its costs: drafts are built and accepted, the drafter reads new prompts
    and rows, and rows are moved. For plain steps, the ratio of actual to expected time is averaged over the latest ones.
    For drafted steps, that ratio is divided by that of plain steps at the time, so that changes in the machine's speed cancel
    out. Its average is the correction of a promised time.

    The first step of each kind does not count, because it may set things up. Nor does a drafted step after a pause, because
    the drafter then reads what it missed.

    Args:
        clock (`Callable`): returns seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._began = self._plain_ms = 0.0
        self._plain: deque[float] = deque(maxlen=PLAIN_WINDOW)
        self._drafted: deque[float] = deque(maxlen=DRAFTED_WINDOW)  # relative to plain steps
        self._counted = 0  # drafted steps since the last pause that count
        self._set_up = False  # a plain step has been taken
        self._plain_in_a_row = 2  # so that the first drafted step does not count
        self._drafts, self._most_drafts = 0, 0  # drafted steps since the last plain one, and before the next

    @property
    def plain_is_due(self) -> bool:
        """Whether the next step should be plain, because the time of plain steps is unknown or old."""
        return self._drafts >= self._most_drafts

    @property
    def correction(self) -> float:
        """Factor on a promised ratio of step times; 1 until both kinds of steps were timed."""
        return _typical(self._drafted) or 1.0

    @property
    def enough(self) -> bool:
        """Whether enough drafted steps have been timed since the last pause for a decision."""
        return self._counted >= FEWEST

    def pause(self) -> None:
        """Drafting pauses. Its correction is kept, but the next drafted steps soon outweigh it."""
        if self._drafted:
            kept = self.correction
            self._drafted.clear()
            self._drafted.append(kept)
        self._counted = 0

    def begin(self, plain_ms: float) -> None:
        """Starts timing a step, which should take this many milliseconds without drafts."""
        self._began, self._plain_ms = self._clock(), plain_ms

    def end(self, step_ms: float | None) -> float | None:
        """Stops timing the step.

        Args:
            step_ms (`float`, *optional*): expected milliseconds of a drafted step; None: it was plain.

        Returns:
            `float`: its time divided by that of a plain step; None until a plain step was timed.
        """
        elapsed = 1e3 * (self._clock() - self._began)
        if step_ms is None:
            if self._set_up:
                self._plain.append(elapsed / max(self._plain_ms, 1e-9))
                self._most_drafts = min(max(2 * self._most_drafts, FIRST_DRAFTS), MOST_DRAFTS)
            self._set_up = True
            self._plain_in_a_row, self._drafts = self._plain_in_a_row + 1, 0
        plain = _typical(self._plain)
        if step_ms is not None:
            if self._plain_in_a_row < 2:
                self._counted += 1
                if plain:
                    self._drafted.append(elapsed / max(step_ms, 1e-9) / plain)
            self._plain_in_a_row, self._drafts = 0, self._drafts + 1
        expected = plain * self._plain_ms
        return elapsed / expected if expected else None


def _typical(ratios: deque[float]) -> float:
    """The mean of the ratios without outliers; 0 if there are none."""
    if not ratios:
        return 0.0
    most = OUTLIER * statistics.median(ratios)
    return statistics.fmean(min(ratio, most) for ratio in ratios)


__all__ = ["StepTimes"]
