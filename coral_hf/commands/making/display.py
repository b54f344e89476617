"""One progress display for all stages of `coral-hf make`."""

import sys
import threading
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


SECONDS = 1.0  # between two updates of the time left


class Display:
    """A progress bar over the time of a make, with the stage, the time left, tokens per second and acceptance so far.

    It moves every second, even if a stage reports nothing. In a log file, each stage begins on a new line.

    Args:
        seconds (`float`): expected time of all stages.
    """

    def __init__(self, seconds: float):
        self.started = time.monotonic()
        self.seconds = seconds
        self.bar = tqdm(total=100, bar_format="{desc} {percentage:3.0f}%|{bar:20}| {postfix}", dynamic_ncols=True)
        self._stage, self._rest = "starting", ""
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._clock.start()

    def show(self, stage: str, **figures: str) -> None:
        """Moves the bar to the elapsed time and shows the stage."""
        begun = stage.partition(",")[0]
        if begun != self._stage.partition(",")[0] and not sys.stderr.isatty():
            tqdm.write(f"make: {begun}", file=sys.stderr)
        self._stage = stage
        self._rest = "".join(f", {value} {name}" for name, value in figures.items())
        self._update()

    def close(self) -> None:
        self._closed.set()
        self._clock.join()
        self.bar.close()

    def _update(self) -> None:
        spent = time.monotonic() - self.started
        self.seconds = max(self.seconds, spent)
        self.bar.n = min(100, 100 * spent / max(self.seconds, 1e-9))
        self.bar.set_description_str(f"make: {self._stage}", refresh=False)
        self.bar.set_postfix_str(f"{clock(self.seconds - spent)} left{self._rest}")

    def _tick(self) -> None:
        while not self._closed.wait(SECONDS):
            self._update()


class ShowTraining(TrainerCallback):
    """Shows a training's log, and ends the training when its time is over.

    Args:
        display ([`Display`])
        seconds (`float`, *optional*): time limit of the training; None: no limit.
    """

    def __init__(self, display: Display, seconds: float | None):
        self.display, self.seconds, self.started = display, seconds, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        figures = {}
        passed = time.monotonic() - self.started
        if logs and logs.get("response_tokens"):
            figures["tokens/s"] = f"{logs['response_tokens'] / max(passed, 1e-9):,.0f}"
        if logs and logs.get("acceptance_length"):
            figures["tokens per step"] = f"{logs['acceptance_length']:.2f}"
        self.display.show(f"training, step {state.global_step} of {state.max_steps}", **figures)


def clock(seconds: float) -> str:
    """`5400` -> `1:30 h`, `90` -> `1:30 min`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{rest:02d} min"


__all__ = ["Display", "ShowTraining", "clock"]
