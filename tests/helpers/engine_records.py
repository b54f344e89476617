"""The dated record of a run in a real serving engine."""

import datetime
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coral_hf import demo
from coral_hf.evaluation.environment import describe_environment


@contextmanager
def engine_record(python: str, distribution: str, name: str, variable: str, **about: Any) -> Iterator[dict[str, Any]]:
    """Yields the record's runs to fill, and writes it to the file that an environment variable names, if one does.

    Args:
        python (`str`): the interpreter that has the engine.
        distribution, name (`str`): of the engine on PyPI, and in the record.
        variable (`str`): of the environment.
        about: what else the record says.
    """
    version = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    found = subprocess.run([python, "-c", version], capture_output=True, text=True, check=False).stdout.strip()
    runs: dict[str, Any] = {}
    yield runs
    if path := os.environ.get(variable):
        record = {
            "date": datetime.date.today().isoformat(),
            name: found,
            "environment": describe_environment("cpu", torch.float32),
            "target": demo.TARGET_NAME,
            **about,
            "runs": runs,
        }
        Path(path).write_text(json.dumps(record, indent=2) + "\n")
