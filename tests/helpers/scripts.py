"""The repository's scripts, run in this process as from a shell."""

import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"


def run(monkeypatch, name: str, *arguments: str) -> None:
    """Runs a script of `examples/` or `benchmarks/`."""
    script = next(folder / name for folder in (EXAMPLES, BENCHMARKS) if (folder / name).exists())
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(script.parent)  # as Python itself does: scripts may import what is beside them
    runpy.run_path(str(script), run_name="__main__")


@contextmanager
def refused(capsys, message: str):
    """A user's error ends a script with one line that contains `message`, and with status 2."""
    with pytest.raises(SystemExit) as stop:
        yield
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error
