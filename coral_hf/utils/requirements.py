"""What the package needs, said where an import fails for want of it."""

import re
from importlib.metadata import PackageNotFoundError, version


OLDEST_TRANSFORMERS = "5.17"


def explained(error: ImportError) -> ImportError:
    """An error that names the Transformers release that is needed, where the one that is installed is older."""
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
