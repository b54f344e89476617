"""Progress bars in a log file: whole lines, now and then, instead of carriage returns."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


SECONDS = 30.0  # between two states of a bar


class LineStream:
    """A text stream that drops most states of progress bars, which end in a carriage return, and ends the rest in a newline.

    Args:
        stream: what is written to.
        seconds (`float`): between two states that are kept; the last one always is.
    """

    def __init__(self, stream: Any, seconds: float = SECONDS):
        self._stream, self._seconds = stream, seconds
        self._state, self._last = "", time.monotonic()
        self._lock = threading.Lock()  # bars may be drawn by a thread of their own

    def write(self, text: str) -> int:
        """Writes text; a state of a bar only if it is due."""
        with self._lock:
            return self._write(text)

    def _write(self, text: str) -> int:
        *states, rest = text.split("\r")
        for state in states:
            self._state += state
            self._show_due()
            self._state = ""
        head, newline, tail = rest.rpartition("\n")
        if newline:  # the line that a bar leaves, or ordinary text
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
        """Passes on everything that does not belong to a bar: text without an end of line stays until it has one, or until the stream is left."""
        self._stream.flush()

    def finish(self) -> None:
        """Writes what has no end of line."""
        if self._state.strip():
            self._stream.write(f"{self._state}\n")
        self._state = ""
        self.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def log_lines() -> Iterator[None]:
    """While it lasts, standard error contains whole lines, unless it is a terminal."""
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
