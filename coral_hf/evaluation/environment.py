"""What a figure must say about where it was measured."""

import platform
from typing import Any

import torch
import transformers

from ..utils.code_version import __version__, code_commit
from ..utils.hardware import device_name


def describe_environment(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device, dtype, threads and commit, as plain JSON values."""
    device = torch.device(device)
    return {
        "coral_hf": __version__,
        "commit": code_commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


__all__ = ["describe_environment"]
