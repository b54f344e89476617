"""Checks that the drafter passed to a call is a loaded CORAL drafter."""

import os
from typing import Any


def is_coral_drafter(model: Any) -> bool:
    """Whether a model is a CORAL drafter, by `model_type`, because remote code creates a different class."""
    return getattr(getattr(model, "config", None), "model_type", None) == "coral"


def check_loaded(drafter: Any) -> None:
    """Raises `ValueError` if the name or folder of a drafter was passed instead of the drafter."""
    if isinstance(drafter, str | os.PathLike):
        raise ValueError(
            f"assistant_model={str(drafter)!r} is the name of a drafter: load it first, with "
            f"AutoModel.from_pretrained({str(drafter)!r})."
        )


def check_whole(drafter: Any) -> None:
    """Raises `ValueError` if a device map left parts of the drafter on disk, because a draft step calls parts of it."""
    if any(parameter.is_meta for parameter in drafter.parameters()):
        raise ValueError(
            "Weights of the drafter are offloaded (on the meta device), but every draft step needs them all: load it without "
            'device_map, or with one device in it (device_map={"": 0}).'
        )


def check_coral_drafter(drafter: Any, function: str) -> None:
    """Raises `ValueError` for anything other than a loaded CORAL drafter.

    Args:
        drafter: the object that was passed to `function`.
        function (`str`): its name, for the error.
    """
    check_loaded(drafter)
    if not is_coral_drafter(drafter):
        raise ValueError(
            f"{function} drafts with a CORAL drafter, but was given {type(drafter).__name__}: load one with "
            "AutoModel.from_pretrained(name), or call target.generate(...), which takes any assistant_model or none."
        )


__all__ = ["check_coral_drafter", "check_loaded", "check_whole", "is_coral_drafter"]
