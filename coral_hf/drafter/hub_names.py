"""Where a loaded model came from: a name that others may read, and its commit on the Hub.

A flat sibling of the model, so that it travels with a published drafter's code.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name


def public_name(name: str | None) -> str | None:
    """A Hub id as it is; of what is a path on somebody's machine its last part alone."""
    if not name:
        return name
    if Path(name).exists():
        return Path(name).resolve().name
    # a revision after the id (`org/name@refs/pr/1`) may contain slashes
    if re.match(r"[./~\\]|[A-Za-z]:\\", name) or re.search(r"/.*/|\\", name.partition("@")[0]):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return name


def hub_commit(config: Any) -> str | None:
    """The commit that a model was loaded from, by its config and the local cache; the Hub is never asked.

    Transformers 5.24 no longer notes the commit in the config (`_commit_hash`), and `from_pretrained` leaves no other
    trace of it: the cache tells where it contains one commit of the repository. Of several it may be any, also where `main`
    is one of them: no commit is better than a wrong one.

    Args:
        config ([`PreTrainedConfig`]): of the loaded model; who knows better may set its `_commit_hash`.

    Returns:
        `str`, or None for a folder's model, and where the cache cannot tell.
    """
    known = getattr(config, "_commit_hash", None)
    name = getattr(config, "_name_or_path", None)
    if known is not None or not name or Path(name).exists():
        return known
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=str(name), repo_type="model"), "snapshots")
    commits = [path.parent.name for path in snapshots.glob("*/config.json")]
    return commits[0] if len(commits) == 1 else None


__all__ = ["hub_commit", "public_name"]
