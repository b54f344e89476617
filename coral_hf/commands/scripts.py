"""Options of scripts, and the exit of scripts and verbs on errors that the user can fix: one line and status 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


# errors from wrong options, files, models and missing extras; other errors are bugs and keep their traceback
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps a docstring's lines and shows defaults."""


def parse_script(*options: type) -> tuple[Any, ...]:
    """Reads a script's options from the command line. `--help` prints the script's docstring first.

    Args:
        *options (`type`): dataclasses. The first one is the script's own.

    Returns:
        `tuple`: an instance of each.
    """
    description = sys.modules[options[0].__module__].__doc__
    parser = HfArgumentParser(options, description=description, formatter_class=_HelpFormatter)
    return parser.parse_args_into_dataclasses()


def run_script(main: Callable[[], Any]) -> None:
    """Runs a script's `main` and exits with its status, or with one line and status 2 on a user's error.

    Raises:
        SystemExit: if the status is not 0.
    """
    try:
        status = main()
    except USER_ERRORS as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


__all__ = ["USER_ERRORS", "one_line", "parse_script", "run_script"]
