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


def _commit() -> str | None:
    """The checkout's commit, None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


__all__ = ["describe_environment"]
