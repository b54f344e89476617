"""Steps that are timed as a whole, on a simulated clock: what costs leave out decides too, and how often it is tried."""

import pytest

from coral_hf.generation.costs.pace import LOST_SHARE, MARGIN, Pace
from coral_hf.generation.costs.step_times import MOST_DRAFTS, StepTimes
from coral_hf.generation.draft_tree import DraftPromise
from coral_hf.generation.tree_size import DraftCosts


COSTS = DraftCosts(tuple(10.0 + 0.5 * n for n in range(1, 65)), 1.0, 0.5)
PLAIN_MS = COSTS.target_ms[0]
TEXT = 200  # plain steps that a text lasts


class Machine:
    """Takes steps with a drafter that promises `speed` times plain decoding, and keeps its promises of tokens.

    Args:
        outside: actual time of a drafted step relative to its costs, which plain steps do not share.
        slow: the same for all steps.
        reading_ms: time for each plain step that the drafter missed before a draft. Older texts have ended.
    """

    def __init__(self, speed: float, outside: float = 1.0, slow: float = 1.0, reading_ms: float = 0.0):
        self.now, self.tokens, self.missed, self.kinds = 0.0, 0.0, 0, ""
        self.outside, self.slow, self.reading_ms = outside, slow, reading_ms
        self.promise = DraftPromise(1.3 * speed - 1, 1.3 * PLAIN_MS, PLAIN_MS)
        self.pace = Pace(lambda: self.now)

    def run(self, steps: int) -> "Machine":
        for _ in range(steps):
            if self.pace.drafts(COSTS):
                took = self.promise.step_ms * self.outside + min(self.missed, TEXT) * self.reading_ms
                self.missed, promise, accepted = 0, self.promise, self.promise.accepted
            else:
                took, promise, accepted = PLAIN_MS, None, 0.0
                self.missed += 1
            self.kinds += "p" if promise is None else "d"
            self.now += took * self.slow / 1e3
            self.tokens += 1 + accepted
            self.pace.add(promise, accepted)
        return self

    @property
    def speed(self) -> float:
        """Tokens per second relative to plain decoding."""
        return self.tokens * PLAIN_MS * self.slow / 1e3 / self.now


@pytest.mark.parametrize("slow", [1.0, 7.0])
def test_a_broken_promise_of_time_ends_drafting(slow):
    """1.1 times plain decoding by the costs, 0.96 times by the clock."""
    machine = Machine(1.1, 1.15, slow).run(600)
    assert machine.kinds.count("d") < 60 and machine.speed > 0.99
    untimed = Machine(1.1, 1.15, slow)
    untimed.pace = Pace()
    untimed.run(600)
    assert "p" not in untimed.kinds and untimed.speed == pytest.approx(1.1 / 1.15)


def test_a_drafter_that_pays_stays_on():
    """Plain steps only keep their time known."""
    machine = Machine(1.3, 1.15).run(600)
    assert "ppp" not in machine.kinds and machine.kinds.count("p") < 600 / MOST_DRAFTS + 6
    assert machine.speed > 1.12


@pytest.mark.parametrize("change", [0.4, 2.5])
def test_another_speed_of_the_machine_is_no_correction(change):
    """It changes during a pause, in which only plain steps are timed, and while steps draft."""
    machine = Machine(1.1, 1.15).run(40)
    assert machine.kinds[-20:] == 20 * "p"
    machine.slow, machine.outside = change, 1.0
    machine.run(600)
    assert machine.kinds[-300:].count("d") > 280
    machine.slow = 1.0
    machine.run(600)
    assert machine.kinds[-300:].count("d") > 280


@pytest.mark.parametrize(("gain", "drafts"), [(MARGIN - 0.01, False), (MARGIN + 0.01, True)])
def test_the_margin(gain, drafts):
    machine = Machine(1.2, 1.2 / (1 + gain)).run(1000)
    assert (machine.kinds[-300:].count("d") > 250) == drafts
    assert machine.speed >= 1.0


def test_it_looks_again_rarely_and_goes_on_where_it_pays():
    machine = Machine(1.1, 1.15).run(300)
    pauses = [len(part) for part in machine.kinds.replace("d", " ").split() if len(part) > 2]
    assert len(pauses) > 1 and min(pauses) >= 16
    machine.outside = 1.0
    machine.run(600)
    assert machine.kinds[-300:].count("d") > 280


@pytest.mark.parametrize("reading_ms", [0.1, 0.5, 1.0])
def test_what_a_look_costs_lengthens_the_pause(reading_ms):
    """The drafter reads what it missed. That says nothing about later steps, but the loss must stay small."""
    machine = Machine(1.1, 1.15, reading_ms=reading_ms).run(6000)
    assert 0 < machine.kinds.count("d") < 300 and machine.speed > 1 - 2 * LOST_SHARE
    assert machine.kinds[-2500:].count("d")  # it still looks
    machine = Machine(1.3, reading_ms=reading_ms)
    machine.missed = 500  # in an earlier pause of other rows
    machine.run(600)
    assert machine.kinds[-300:].count("d") > 280


def test_single_slow_steps_count_little():
    """Another process that holds the machine for a moment."""
    machine, hiccups = Machine(1.2), range(50, 600, 60)
    for step in range(600):
        machine.slow = 20.0 if step in hiccups else 1.0
        machine.run(1)
    assert machine.kinds.count("d") > 500


def test_the_first_steps_do_not_count():
    """They set things up."""
    times = [0.0]
    steps = StepTimes(lambda: times[0])

    def step(took: float, expected: float | None) -> float | None:
        steps.begin(10.0)
        times[0] += took / 1e3
        return steps.end(expected)

    assert steps.plain_is_due and step(900.0, None) is None
    assert steps.plain_is_due and step(20.0, None) == pytest.approx(1.0)
    assert not steps.plain_is_due and step(900.0, 15.0) == pytest.approx(45.0) and steps.correction == 1.0
    step(45.0, 15.0)
    assert steps.correction == pytest.approx(1.5)
