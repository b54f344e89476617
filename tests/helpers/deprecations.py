"""Finds deprecations in Transformers' log that we cause: `filterwarnings` in pyproject.toml only sees warnings."""

import logging
import sys
from pathlib import Path


_OURS = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "coral_hf"))
_LOGGING = ("/logging/__init__.py", "/transformers/utils/logging.py", __file__)
# What may stand between our call and the function that warns: wrappers that pass the call on.
_PASSING_ON = (
    "/transformers/utils/",
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
    "/accelerate/hooks.py",
    "/coral_hf/generation/attachment.py",
)


class OurDeprecations(logging.Handler):
    """Collects the deprecations that the package or a test causes, and ignores those of other libraries."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower() and (place := _our_call()) is not None:
            self.messages.append(f"{place}: {message}")


def _our_call() -> str | None:
    """`file:line` of the call into the logging file, if that line is in this repository."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename.endswith(_LOGGING):
        frame = frame.f_back
    # The function that was called may have left the warning to a helper beside it: `generate` does.
    helpers = frame and frame.f_code.co_filename
    frame = frame and frame.f_back
    passing_on = _PASSING_ON if helpers is None or helpers.startswith(_OURS) else (helpers, *_PASSING_ON)
    while frame is not None and any(part in frame.f_code.co_filename for part in passing_on):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(_OURS):
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


__all__ = ["OurDeprecations"]
