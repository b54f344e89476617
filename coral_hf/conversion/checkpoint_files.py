"""Reads checkpoint folders without running code from them, and writes folders that are either complete or absent."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..drafter.weight_files import check_index
from ..utils.jsonl import read_json


CONFIG_FILE = "config.json"
# SGLang's `--speculative-token-map`: the ids that drafting is limited to
HOT_TOKENS_FILE = "hot_token_ids.pt"
# In order of preference: safetensors cannot contain code.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_FETCH_AGAIN = "Fetch the checkpoint again."


def resolve_folder(path_or_repo: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a checkpoint. For a Hub id, fetches config and weights (in one format) from the cache or the Hub.

    Args:
        path_or_repo (`str` or `os.PathLike`): a folder or a Hub id.
        revision (`str`, *optional*): branch, tag or commit of the Hub repository.

    Raises:
        OSError: if it is neither a folder nor a repository that can be fetched.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(path_or_repo).startswith((".", "/", "~")):
        raise OSError(f"{path_or_repo} is not a folder; give one with a {CONFIG_FILE} and weights, or a Hub id.")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repo = str(path_or_repo)
    failed = f"{repo!r} is not a local folder, and fetching it from the Hub failed: "
    try:
        listed = HfApi().list_repo_tree(repo, revision=revision)
        names = [entry.path for entry in listed if "/" not in entry.path]  # some servers also list subfolders
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_wanted_files(names)))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise OSError(f"{failed}{error}") from error
    except (HTTPError, OSError, ValueError) as error:
        try:  # no network: use files fetched before, of which only the config's name is known
            cached = snapshot_download(repo, revision=revision, allow_patterns=[CONFIG_FILE], local_files_only=True)
            return Path(cached)
        except (OSError, ValueError):
            raise OSError(f"{failed}{error}") from error


def _wanted_files(names: list[str]) -> list[str]:
    """The top-level files of a repository to fetch. A checkpoint in several formats is fetched in one."""
    wanted = [name for name in (CONFIG_FILE, HOT_TOKENS_FILE) if name in names]
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    if weights is not None and weights.endswith(".index.json"):
        # the shards that the index names are only known once it is fetched
        form = Path(weights.removesuffix(".index.json")).suffix
        wanted += [name for name in names if name.endswith(form)]
    return wanted if weights is None else [*wanted, weights]


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dict; `ValueError` if it is missing, malformed or not an object."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} contains no {CONFIG_FILE}; give the folder of a checkpoint.")
    return read_json(path)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in the first of `WEIGHT_FILES` that it has, sharded or not.

    Raises:
        ValueError: if there are no weights, a file is damaged or contains anything but tensors, or shards and index differ.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} contains no weights: put one of {list(WEIGHT_FILES)} next to its {CONFIG_FILE}.")
    if not name.endswith(".index.json"):
        return read_weight_file(folder / name)
    weight_map = check_index(folder / name, read_json(folder / name))
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks the shards {absent} that {name} names. {_FETCH_AGAIN}")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        part = read_weight_file(folder / shard)
        twice = sorted(set(part) & set(tensors))
        if twice:
            raise ValueError(
                f"{folder / shard} contains tensors that are also in another shard: {twice}. {_FETCH_AGAIN}"
            )
        tensors |= part
    missing, extra = sorted(set(weight_map) - set(tensors)), sorted(set(tensors) - set(weight_map))
    if missing or extra:
        raise ValueError(
            f"The shards in {folder} and {name} differ: missing {missing}, not in the index {extra}. {_FETCH_AGAIN}"
        )
    return tensors


def read_weight_file(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors or pickle file of named tensors. A pickle is never allowed to run code.

    Raises:
        ValueError: if the file is damaged or contains anything but a dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = load_plain_pickle(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). {_FETCH_AGAIN}") from error
    wrong = None
    if not isinstance(loaded, dict):
        wrong = type(loaded).__name__
    elif others := sorted(str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)):
        wrong = f"non-tensors under {others}"
    elif unnamed := [key for key in loaded if not isinstance(key, str)]:
        wrong = f"tensors under {unnamed}, which are not names"
    if wrong is not None:
        raise ValueError(f"{path} must contain named tensors only; found {wrong}. Save the state dict alone.")
    return loaded


def load_plain_pickle(path: Path) -> Any:
    """`torch.load` that accepts plain data only.

    Raises:
        ValueError: if the file is damaged or the pickle would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message continues with advice to disable the check
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} contains more than plain tensors and would run code when loaded, so it is not loaded. Ask for a safetensors "
            f"file. ({reason})"
        ) from error
    except Exception as error:
        # torch's reader raises all kinds of errors for damaged bytes: KeyError, struct.error, AssertionError, ...
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {_FETCH_AGAIN}") from error


def check_new_folder(folder: str | os.PathLike) -> Path:
    """Raises `ValueError` unless a folder can be created here: absent or empty."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; name a new or an empty folder.")
    return folder


@contextmanager
def staged_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder next to `folder`. It is renamed to `folder` on success and removed on failure."""
    folder = check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


__all__ = [
    "CONFIG_FILE",
    "HOT_TOKENS_FILE",
    "check_new_folder",
    "load_plain_pickle",
    "read_config",
    "read_tensors",
    "resolve_folder",
    "staged_folder",
]
