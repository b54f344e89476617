"""Errors for imports that fail because a required version is missing."""

import re
from importlib.metadata import PackageNotFoundError, version


OLDEST_TRANSFORMERS = "5.17"


def explained(error: ImportError) -> ImportError:
    """An error that names the required Transformers release, if the installed one is older."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return error
    if _parts(found) >= _parts(OLDEST_TRANSFORMERS):
        return error
    needed = f"transformers>={OLDEST_TRANSFORMERS}"
    return ImportError(f"coral_hf needs {needed}, found {found}: pip install -U '{needed}'.")


def _parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


__all__ = ["explained"]
