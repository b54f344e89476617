"""Publishes a drafter: writes the files of a published folder, and pushes it to the Hub.

A published folder contains, next to config and weights: the card; the records for its figures; the model's code with an
`auto_map`, so that `AutoModel.from_pretrained(..., trust_remote_code=True)` needs no package; and `custom_generate/`.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.dynamic_module_utils import get_relative_import_files

from ..drafter import modeling_coral
from ..drafter.configuration_coral import CoralDraftConfig
from ..drafter.hub_names import public_name
from ..utils.code_version import __version__
from ..utils.jsonl import parse_json, read_json
from ..utils.replacing import check_replaceable
from ..utils.whole_files import write_json
from .model_card import write_card
from .records import RECORD_FOLDER


AUTO_MAP = {"AutoConfig": "configuration_coral.CoralDraftConfig", "AutoModel": "modeling_coral.CoralDraftModel"}

# keys of values that are Hub ids or paths
_NAMES = ("target", "target_name_or_path", "base_model_name_or_path", "drafter", "assistant", "data")


def push_drafter(
    drafter: Any,
    repo_id: str,
    *,
    record: str | Path | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    **stated: Any,
) -> str:
    """Publishes a drafter. The card is written first, so that nothing is sent if that fails.

    Args:
        drafter ([`CoralDraftModel`])
        repo_id (`str`): `"org/name"`, or `"name"` in your own namespace.
        record (`str` or `Path`, *optional*): folder of the records (see `hub.records`), or a `benchmark.json`. Default: the
            `training/` folder next to the weights that the drafter was loaded from. Without records, the card's figures are
            "not measured".
        private (`bool`, *optional*): whether a new repository is private.
        token (`str`, *optional*): default: the token of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*): branch to push to, created if missing.
        commit_message, commit_description (`str`, *optional*), create_pr (`bool`)
        **stated: keys of `card.json`, for example `license`.

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: without a token, offline, or for records of another drafter.
        OSError: if the Hub rejects the upload or the connection fails. Nothing is committed then.
    """
    require_token(token)
    with tempfile.TemporaryDirectory() as folder:
        write_publication(drafter, folder, repo_id, record, stated)
        with hub_errors(repo_id):
            api = HfApi(library_name="coral_hf", library_version=__version__)
            check_repository(repo_id, revision, token)
            repo = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo, branch=revision, token=token, exist_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                token=token,
                revision=revision,
                commit_message=commit_message or "Upload CORAL drafter",
                commit_description=commit_description,
                create_pr=create_pr,
            )


def write_publication(
    drafter: Any,
    folder: str | Path,
    repo_id: str,
    record: str | Path | None = None,
    stated: dict[str, Any] | None = None,
) -> None:
    """Writes everything that [`push_drafter`] sends to a folder.

    Args:
        drafter ([`CoralDraftModel`]), folder (`str` or `Path`): a new or empty folder.
        repo_id (`str`), record (`str` or `Path`, *optional*), stated (`dict`, *optional*): see [`push_drafter`].

    Raises:
        ValueError: for records of another drafter.
    """
    # one file, as required for a published drafter
    drafter.save_pretrained(folder, max_shard_size="100GB")
    _copy_records(drafter, record, Path(folder))
    prepare_folder(folder, repo_id, stated)


def prepare_folder(folder: str | Path, repo_id: str | None = None, stated: dict[str, Any] | None = None) -> None:
    """Adds card, code and `custom_generate/` to a folder that `save_pretrained` wrote, and removes paths from its files.

    Raises:
        ValueError: for records of another drafter, or damaged ones.
    """
    folder = Path(folder)
    strip_paths(folder)
    write_card(folder, repo_id=repo_id, unmeasured=True, stated=stated)
    write_code(folder)
    custom = folder / "custom_generate"
    custom.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("custom_generate") / "generate.py", custom / "generate.py")
    (custom / "requirements.txt").write_text(f"coral-hf>={__version__}\n", encoding="utf-8")


def write_code(folder: str | Path) -> None:
    """Copies the model's code to a folder that `save_pretrained` wrote, and names it in its config (`auto_map`)."""
    folder = Path(folder)
    source = modeling_coral.__file__
    for path in [source, *get_relative_import_files(source)]:
        shutil.copyfile(path, folder / Path(path).name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = AUTO_MAP
    write_json(folder / "config.json", dict(sorted(config.items())))


def strip_paths(folder: str | Path) -> None:
    """Shortens the paths of models and data in config, records and adapters to their last part."""
    patterns = ("config.json", f"{RECORD_FOLDER}/*.json", "adapter/*.json")
    for path in itertools.chain.from_iterable(map(Path(folder).glob, patterns)):
        if path.name == "card.json":  # contains sentences
            continue
        held = parse_json(path.read_text(encoding="utf-8"), str(path), "Write it again or delete it.")
        if (public := _without_paths(held)) != held:
            path.write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")


def _without_paths(value: Any, key: str | None = None) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(held, name) for name, held in value.items()}
    if isinstance(value, list):
        return [_without_paths(held, key) for held in value]
    return public_name(value) if key in _NAMES and isinstance(value, str) else value


def check_repository(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Raises `ValueError` if a push would replace a model in a Hub repository that is not a drafter."""
    try:
        path = hf_hub_download(repo_id, "config.json", revision=revision, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):  # nothing there yet
        return
    found = read_json(path).get("model_type")
    kind = CoralDraftConfig.model_type
    check_replaceable(
        repo_id, None if found == kind else f"a model of type {found!r}", False, "give the drafter another repository"
    )


def require_token(token: str | bool | None) -> None:
    """Raises `ValueError` offline or without a token."""
    if constants.is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE=1 is set, so nothing can be pushed: unset it and try again.")
    if not isinstance(token, str) and (token is False or get_token() is None):
        raise ValueError(
            "No Hugging Face token to push with: run `hf auth login` or set HF_TOKEN (a token with write access, from "
            "https://huggingface.co/settings/tokens), or pass token=...."
        )


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raises an error with a remedy for a failed push."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"The Hub rejected the token for {repo_id} (status {status}): create one with write access to it at "
                "https://huggingface.co/settings/tokens and run `hf auth login`, or pass token=...."
            ) from error
        raise OSError(
            f"The Hub answered status {status} for {repo_id} ({' '.join(str(error).split())}). Check the name and push again."
        ) from error
    except (HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _came_from_the_client(error):
            raise
        raise ConnectionError(
            f"The connection failed while pushing to {repo_id} ({' '.join(str(error).split())}). The repository is "
            "unchanged, because a push is one commit. Push again; files that have arrived are not sent twice."
        ) from error


def _came_from_the_client(error: BaseException) -> bool:
    """Whether an error comes from an upload: these are plain RuntimeErrors, which torch also raises."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith("huggingface_hub"):
            return True
        frame = frame.tb_next
    return False


def _copy_records(drafter: Any, record: str | Path | None, folder: Path) -> None:
    if record is None:
        loaded_from = drafter.config._name_or_path
        record = Path(loaded_from, RECORD_FOLDER) if loaded_from else None
        if record is None or not record.is_dir():
            return
    record = Path(record)
    if record.is_file():
        (folder / RECORD_FOLDER).mkdir()
        shutil.copyfile(record, folder / RECORD_FOLDER / "benchmark.json")
    elif record.is_dir():
        shutil.copytree(record, folder / RECORD_FOLDER)
    else:
        raise ValueError(
            f"record={str(record)!r} does not exist; give the folder that `coral-hf benchmark --output` wrote, or none."
        )


__all__ = [
    "check_repository",
    "hub_errors",
    "prepare_folder",
    "push_drafter",
    "require_token",
    "strip_paths",
    "write_code",
    "write_publication",
]
