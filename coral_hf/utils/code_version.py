"""The version of the running code: the release, and the commit of a checkout."""

import subprocess
from pathlib import Path


__version__ = "0.1.0"


def code_commit(root: Path | None = None) -> str | None:
    """The checkout's commit, with `-dirty` if its code was changed; None for an installed package."""
    root = root or Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    # only the code, because a rewritten record does not change figures
    changed = _git(root, "status", "--porcelain", "--", "coral_hf", "examples/*.py", "benchmarks/*.py")
    return f"{commit}-dirty" if commit and changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


__all__ = ["__version__", "code_commit"]
