"""A drafter's weights on disk: their file, their hash, and checks before anything is loaded.

This file is next to the model, so that it is published with a drafter's code.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from .hub_names import hub_commit


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.bin")
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# the size of the widest dtype, and room for the header
_MOST_BYTES_PER_PARAMETER, _HEADER_BYTES = 8, 1 << 20


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def follow_umask(path: str | os.PathLike) -> None:
    """Gives weights the file mode that the umask gives to new files.

    safetensors makes files readable only for the owner, regardless of the umask, so that a server under another user could
    not read them.

    Args:
        path (`str` or `os.PathLike`): a safetensors file, or a folder of them.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.exists() else []
    if not files:
        return
    # uses the mode of a new file, because reading the umask means changing it for every thread
    probe = files[0].parent / f".mode-{uuid.uuid4().hex}"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in files:
        with contextlib.suppress(PermissionError):  # another user's file, which was not just written
            file.chmod(mode)


def drafter_sha256(drafter: Any) -> str | None:
    """SHA-256 of the file that a drafter was loaded from.

    Args:
        drafter ([`CoralDraftModel`]): a drafter, which may have been cast since.

    Returns:
        `str`, or None if the drafter was never on disk or was trained since it was loaded.
    """
    name = drafter.config._name_or_path
    if not name:
        return None
    path = cached_file(
        name,
        WEIGHTS_FILE,
        revision=hub_commit(drafter.config),
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
        for key, value in drafter.state_dict().items():
            if key not in names or not torch.equal(stored.get_tensor(key).to(value.dtype), value.cpu()):
                return None
    return file_sha256(path)


@contextlib.contextmanager
def loading(name: Any) -> Iterator[None]:
    """Converts errors of Transformers and safetensors for a damaged file to a `ValueError` that names the file."""
    remedy = "Fetch it again, or save the drafter again with drafter.save_pretrained(folder)."
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name}: {WEIGHTS_FILE} is damaged ({error}). {remedy}") from error
    except (AttributeError, LookupError, RecursionError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"{name}: config.json is malformed, or an argument unknown ({type(error).__name__}: {error}). {remedy}"
        ) from error
    except ValueError as error:  # from a setting, whose error does not name the file
        if str(name) in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def most_bytes(model: torch.nn.Module) -> int:
    """The largest possible size of a model's weights file. The model may be on the meta device."""
    return _MOST_BYTES_PER_PARAMETER * sum(tensor.numel() for tensor in model.state_dict().values()) + _HEADER_BYTES


def check_size(size: int, limit: int, name: str) -> None:
    """Raises `ValueError` if a weights file is larger than its drafter's config allows."""
    if size > limit:
        raise ValueError(
            f"{name}: {WEIGHTS_FILE} has {size / 1e6:.1f} MB, but a drafter of this config.json needs at most "
            f"{limit / 1e6:.1f} MB: these are another model's weights. Save the drafter again with "
            "drafter.save_pretrained(folder), or load the model they belong to."
        )


def check_shapes(name: Any, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raises `ValueError` for tensors `(name, shape on file, shape in the model)` whose two shapes differ."""
    shapes = [f"{key} is {list(found)}, not {list(expected)}" for key, found, expected in sorted(mismatched)]
    if shapes:
        more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        raise ValueError(
            f"{name}: {WEIGHTS_FILE} does not fit config.json ({'; '.join(shapes[:3])}{more}): one of them was changed or "
            "is another drafter's. Fetch both again, or save the drafter again with drafter.save_pretrained(folder)."
        )


def check_weights(name: str | os.PathLike, limit: int, **hub: Any) -> None:
    """Rejects missing, pickled or too large weights. On the Hub, this happens before they are downloaded.

    Args:
        name (`str` or `os.PathLike`): a folder or Hub id.
        limit (`int`): bytes, see [`most_bytes`].
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, as for `from_pretrained`.

    Raises:
        ValueError: with the problem and a remedy.
    """
    folder = Path(name, hub.get("subfolder") or "")
    if folder.is_dir():
        if (folder / WEIGHTS_FILE).is_file():
            check_size((folder / WEIGHTS_FILE).stat().st_size, limit, str(name))
        elif (folder / INDEX_FILE).is_file():
            check_index(folder / INDEX_FILE, json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")))
        else:
            _refuse(str(name), [file for file in PICKLED_FILES if (folder / file).is_file()])
        return
    hub = {key: value for key, value in hub.items() if value is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
    if constants.is_offline_mode() or hub.get("local_files_only"):
        # `from_pretrained` reports files that are missing in the cache
        path = cached_file(str(name), WEIGHTS_FILE, **quiet, _raise_exceptions_for_connection_errors=False)
        if path is not None:
            check_size(Path(path).stat().st_size, limit, str(name))
        return
    size = _remote_size(str(name), WEIGHTS_FILE, hub)
    if size is not None:
        check_size(size, limit, str(name))
    elif _remote_size(str(name), INDEX_FILE, hub) is None:
        _refuse(str(name), [file for file in PICKLED_FILES if _remote_size(str(name), file, hub) is not None])


def check_before_loading(model_class: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Rejects what `model_class.from_pretrained(name, **kwargs)` must not load, based on its config.

    Args:
        model_class (`type`): [`CoralDraftModel`], or the class from the code next to the weights.
        name (`str` or `os.PathLike`): a folder or Hub id.
        kwargs (`dict`): as for `from_pretrained`. Only a `config` and those that locate the files are used.

    Raises:
        ValueError: as in [`check_weights`].
    """
    hub = {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}
    config_class, config = model_class.config_class, kwargs.get("config")
    # compared by type, because remote code has another class
    if getattr(config, "model_type", None) != config_class.model_type:
        config = config_class.from_pretrained(config or name, **hub)
    with torch.device("meta"):
        limit = most_bytes(model_class(config))
    check_weights(name, limit, **hub)


def check_index(path: str | os.PathLike, index: Any) -> dict[str, str]:
    """Tensor names and their shards from an index of shards, which may come from anywhere.

    Args:
        path (`str` or `os.PathLike`): path of the index, for the message.
        index: its JSON value.

    Raises:
        ValueError: if it is not an index, or names files outside its folder.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path} contains no weight_map, so it is not an index of shards. Fetch it again, with its shards."
        )
    outside = sorted({str(shard) for shard in weight_map.values() if Path(str(shard)).name != shard})
    if outside:
        raise ValueError(f"{path} names shards outside its folder: {outside}. Fetch it again, with its shards.")
    return weight_map


def _remote_size(name: str, file: str, hub: dict[str, Any]) -> int | None:
    """Size of a file on the Hub; None if the repository lacks it, 0 if the Hub cannot be reached."""
    url = hf_hub_url(name, file, subfolder=hub.get("subfolder"), revision=hub.get("revision"))
    try:
        return get_hf_file_metadata(url, token=hub.get("token")).size or 0
    except EntryNotFoundError:
        return None
    except (
        HTTPError,
        OSError,
    ):  # no network, no such repository, no access: `from_pretrained` finds a copy or says so
        return 0


def _refuse(name: str, pickled: list[str]) -> None:
    if pickled:
        raise ValueError(
            f"{name} contains {pickled[0]}, a pickle, which can run code when it is loaded; drafters are read from "
            f"{WEIGHTS_FILE} only. If you trust it, load it with torch.load(..., weights_only=True) in a separate process "
            "and save the drafter with drafter.save_pretrained(folder)."
        )
    raise ValueError(
        f"{name} contains no {WEIGHTS_FILE}: the upload or copy is not complete, or it is not a drafter. Save the drafter "
        "again with drafter.save_pretrained(folder), or push it again with drafter.push_to_hub(name)."
    )


__all__ = [
    "WEIGHTS_FILE",
    "check_before_loading",
    "check_index",
    "check_shapes",
    "check_size",
    "check_weights",
    "drafter_sha256",
    "file_sha256",
    "follow_umask",
    "loading",
    "most_bytes",
]
