"""The origin of a loaded model: a public name, and its commit on the Hub.

This file is next to the model, so that it is published with a drafter's code.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name


def public_name(name: str | None) -> str | None:
    """Returns a Hub id unchanged, and only the last part of a local path."""
    if not name:
        return name
    if Path(name).exists():
        return Path(name).resolve().name
    # a revision after the id (`org/name@refs/pr/1`) may contain slashes
    if re.match(r"[./~\\]|[A-Za-z]:\\", name) or re.search(r"/.*/|\\", name.partition("@")[0]):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return name


def hub_commit(config: Any) -> str | None:
    """The commit that a model was loaded from, according to its config and the local cache, without querying the Hub.

    Transformers 5.24 no longer records the commit in the config (`_commit_hash`). The cache tells the commit if it contains
    exactly one of the repository. With several commits it could be any of them, even if one is `main`, so None is returned.

    Args:
        config ([`PreTrainedConfig`]): config of the loaded model. Callers that know the commit may set `_commit_hash`.

    Returns:
        `str`, or None for a model from a folder, or if the cache cannot tell.
    """
    known = getattr(config, "_commit_hash", None)
    name = getattr(config, "_name_or_path", None)
    if known is not None or not name or Path(name).exists():
        return known
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=str(name), repo_type="model"), "snapshots")
    commits = [path.parent.name for path in snapshots.glob("*/config.json")]
    return commits[0] if len(commits) == 1 else None


__all__ = ["hub_commit", "public_name"]
