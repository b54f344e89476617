"""What a figure must say about where it was measured."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from ..hardware import device_name


def describe_environment(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device, dtype, threads and commit, as plain JSON values."""
    from .. import __version__

    device = torch.device(device)
    return {
        "coral_hf": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _commit(root: Path | None = None) -> str | None:
    """The checkout's commit, with `-dirty` where its code is another; None for an installed package."""
    root = root or Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    # the code alone: a record that was just written anew changes no figure
    changed = _git(root, "status", "--porcelain", "--", "coral_hf", "examples/*.py")
    return f"{commit}-dirty" if commit and changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


__all__ = ["describe_environment"]
