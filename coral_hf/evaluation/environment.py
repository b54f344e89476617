"""The environment of a measurement, for records."""

import platform
from collections.abc import Sequence
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
    """The target of a record: its name and, if it is from the Hub, its commit."""
    config = target.config
    return {"target": public_name(config._name_or_path), "target_revision": hub_commit(config)}


def describe_rendering(tokenizer: Any) -> dict[str, Any]:
    """The mode of a record: the chat-template variables of the run, without those of single prompts."""
    return {"chat_template_kwargs": template_kwargs_of(tokenizer)}


def describe_drafter(drafter: Any) -> dict[str, Any]:
    """The drafter of a record: its Hub id or folder name, and the hash of its weights file."""
    return {
        "drafter": None if drafter is None else public_name(drafter.config._name_or_path or None),
        "drafter_sha256": None if drafter is None else drafter_sha256(drafter),
    }


def describe_methods(methods: Sequence[Any]) -> dict[str, Any]:
    """What a record says of its methods ([`Method`]): `methods` (settings), `drafters` by method, and the drafter if it is one alone."""
    drafters = {id(method.drafter): method.drafter for method in methods if method.is_coral}
    described = {key: describe_drafter(drafter) for key, drafter in drafters.items()}
    assistants = {
        m.name: {"assistant": public_name(m.drafter.config._name_or_path)}
        for m in methods
        if m.drafter is not None and not m.is_coral
    }
    return {
        # several drafters' figures must not go into the card of one
        **(next(iter(described.values())) if len(described) == 1 else describe_drafter(None)),
        "drafters": {method.name: described[id(method.drafter)] for method in methods if method.is_coral},
        "methods": {method.name: {**assistants.get(method.name, {}), **method.settings} for method in methods},
    }


__all__ = ["describe_drafter", "describe_environment", "describe_methods", "describe_rendering", "describe_target"]
