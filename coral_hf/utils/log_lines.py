"""Progress bars in a log file: occasional whole lines instead of carriage returns."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


SECONDS = 30.0  # between two logged states of a bar


class LineStream:
    """A text stream that drops most states of progress bars (which end in a carriage return), and ends the rest in a newline.

    Args:
        stream: the underlying stream.
        seconds (`float`): time between two kept states. The last state is always kept.
    """

    def __init__(self, stream: Any, seconds: float = SECONDS):
        self._stream, self._seconds = stream, seconds
        self._state, self._last = "", time.monotonic()
        self._lock = threading.Lock()  # bars may be drawn by another thread

    def write(self, text: str) -> int:
        """Writes text, and states of a bar only if they are due."""
        with self._lock:
            return self._write(text)

    def _write(self, text: str) -> int:
        *states, rest = text.split("\r")
        for state in states:
            self._state += state
            self._show_due()
            self._state = ""
        head, newline, tail = rest.rpartition("\n")
        if newline:  # the final line of a bar, or ordinary text
            self._stream.write(f"{self._state}{head}\n")
            self._state = ""
        self._state += tail
        return len(text)

    def _show_due(self) -> None:
        now = time.monotonic()
        if self._state.strip() and now - self._last >= self._seconds:
            self._stream.write(f"{self._state.strip()}\n")
            self._last = now

    def flush(self) -> None:
        """Writes everything that does not belong to a bar. Text without a newline is kept until it has one, or until the end."""
        self._stream.flush()

    def finish(self) -> None:
        """Writes text without a newline."""
        if self._state.strip():
            self._stream.write(f"{self._state}\n")
        self._state = ""
        self.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def log_lines() -> Iterator[None]:
    """Context in which standard error receives whole lines, unless it is a terminal."""
    before = sys.stderr
    if before.isatty():
        yield
        return
    lines = LineStream(before)
    sys.stderr = lines  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = before
        lines.finish()


__all__ = ["LineStream", "log_lines"]
