"""How scripts read their options, and how they and the verbs end on what their user can mend: one line and status 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


# of wrong options, files, models and missing extras; others are faults of the package and keep their traceback
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves a docstring's lines as they are, and states defaults."""


def parse_script(*options: type) -> tuple[Any, ...]:
    """A script's options, from the command line; `--help` prints the script's docstring first.

    Args:
        *options (`type`): dataclasses; the first is the script's own.

    Returns:
        `tuple`: an instance of each.
    """
    description = sys.modules[options[0].__module__].__doc__
    parser = HfArgumentParser(options, description=description, formatter_class=_HelpFormatter)
    return parser.parse_args_into_dataclasses()


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


__all__ = ["USER_ERRORS", "one_line", "parse_script", "run_script"]
