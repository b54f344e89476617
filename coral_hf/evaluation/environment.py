"""What a figure must say about where it was measured."""

import platform
from typing import Any

import torch
import transformers

from ..data.chat import template_kwargs_of
from ..drafter.hub_names import hub_commit, public_name
from ..drafter.weight_files import drafter_sha256
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


def describe_target(target: Any) -> dict[str, Any]:
    """Which target a record measured: its name and, if it is of the Hub, its commit."""
    config = target.config
    return {"target": public_name(config._name_or_path), "target_revision": hub_commit(config)}


def describe_rendering(tokenizer: Any) -> dict[str, Any]:
    """In which mode a record measured: the variables of the chat template, a prompt's own aside."""
    return {"chat_template_kwargs": template_kwargs_of(tokenizer)}


def describe_drafter(drafter: Any) -> dict[str, Any]:
    """Which drafter a record measured: its Hub id or folder's name, and the hash of its weights file."""
    return {
        "drafter": None if drafter is None else public_name(drafter.config._name_or_path or None),
        "drafter_sha256": None if drafter is None else drafter_sha256(drafter),
    }


__all__ = ["describe_drafter", "describe_environment", "describe_rendering", "describe_target"]
