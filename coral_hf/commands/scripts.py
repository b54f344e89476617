"""How verbs and example scripts end on what their user can mend: one line and status 2."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


# of wrong options, files, models and missing extras; others are faults of the package and keep their traceback
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def run_script(main: Callable[[], Any]) -> None:
    """Runs a script's `main` and leaves with the status it returns, or as above on a user's error.

    Raises:
        SystemExit: unless all went well.
    """
    try:
        status = main()
    except USER_ERRORS as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


__all__ = ["USER_ERRORS", "one_line", "run_script"]
