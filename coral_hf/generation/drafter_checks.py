"""Whether what a call was given as its drafter is one."""

import os
from typing import Any


def is_coral_drafter(model: Any) -> bool:
    """By `model_type`, not by class: a class loaded as remote code is another one."""
    return getattr(getattr(model, "config", None), "model_type", None) == "coral"


def check_loaded(drafter: Any) -> None:
    """Raises `ValueError` for a drafter's name or folder in its place."""
    if isinstance(drafter, str | os.PathLike):
        raise ValueError(
            f"assistant_model={str(drafter)!r} is the name of a drafter: load it first, with "
            f"AutoModel.from_pretrained({str(drafter)!r})."
        )


def check_whole(drafter: Any) -> None:
    """Raises `ValueError` for a drafter of which a device map left parts on the disk: a draft step calls parts of it."""
    if any(parameter.is_meta for parameter in drafter.parameters()):
        raise ValueError(
            "Weights of the drafter are offloaded (on the meta device), but every draft step needs them all: load it without "
            'device_map, or with one device in it (device_map={"": 0}).'
        )


def check_coral_drafter(drafter: Any, function: str) -> None:
    """Raises `ValueError` for anything else than a loaded CORAL drafter.

    Args:
        drafter: what `function` was given.
        function (`str`): its name, for the error.
    """
    check_loaded(drafter)
    if not is_coral_drafter(drafter):
        raise ValueError(
            f"{function} drafts with a CORAL drafter, and was given {type(drafter).__name__}: load one with "
            "AutoModel.from_pretrained(name), or call target.generate(...), which takes any assistant_model or none."
        )


__all__ = ["check_coral_drafter", "check_loaded", "check_whole", "is_coral_drafter"]
