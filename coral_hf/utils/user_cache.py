"""The package's cache for files that it can create again: converted targets and measured costs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """
    The folder of the package's cache: `$CORAL_HF_CACHE`, else `$XDG_CACHE_HOME/coral_hf`, else `~/.cache/coral_hf`.
    """
    if folder := os.environ.get("CORAL_HF_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coral_hf"


__all__ = ["cache_dir"]
