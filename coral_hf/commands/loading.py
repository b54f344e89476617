"""Loads the models that several verbs share, from the names on the command line."""

import contextlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .. import demo
from ..drafter.modeling_coral import CoralDraftModel
from ..drafter.weight_files import WEIGHTS_FILE, check_index
from ..utils.hardware import default_device, native_bfloat16
from ..utils.jsonl import read_json
from .parsing.wrong_models import check_is_drafter, check_is_target


DEMO = "demo"


# other names of dtypes
_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's


@dataclass(kw_only=True)
class TargetOptions:
    """The options for the target, which all verbs share."""

    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    target_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of the target's Hub repository, for example v1.0 (default: its main branch)."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code from the target's (and an assistant's) repository. Read it first."},
    )

    def __post_init__(self) -> None:
        if self.target in (None, DEMO):
            for name in ("target_revision", "trust_remote_code", "device_map"):
                if value := getattr(self, name, None):
                    instead = ", or use --device" if name == "device_map" else ""
                    raise ValueError(
                        f"--{name} {value} is for a target in a folder or on the Hub, but 'demo' has only one version: name "
                        f"another target with --target, or leave --{name} out{instead}."
                    )

    def load_target(self, dtype: str | torch.dtype, device: str | None = None):
        """The target and its tokenizer, see [`load_target`]."""
        return load_target(self.target, dtype, device, **self.loading_arguments)

    @property
    def loading_arguments(self) -> dict[str, Any]:
        """Arguments of [`load_target`] other than name, dtype and device."""
        return {"revision": self.target_revision, "trust_remote_code": self.trust_remote_code}


@dataclass(kw_only=True)
class DrafterOptions:
    """The options that verbs with a `--drafter` share."""

    drafter_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of the Hub repository of --drafter, or of each --drafter (default: main)."
        },
    )


@dataclass(kw_only=True)
class PlacedTargetOptions(TargetOptions):
    """Options for a target that generates, on one device or several."""

    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "Let accelerate place the target instead of --device: auto (over all GPUs), balanced, "
            "balanced_low_0, sequential, a device (cuda:1), or JSON of modules and devices (or disk)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_map is not None and self.device is not None:
            raise ValueError(
                f"--device_map {self.device_map} and --device {self.device} both place the target: give only one of them."
            )

    def load_target(self, dtype: str | torch.dtype, device: str | None = None):
        return super().load_target(dtype, device or self.device)

    @property
    def loading_arguments(self) -> dict[str, Any]:
        return {**super().loading_arguments, "device_map": self.device_map}


def load_target(
    name: str,
    dtype: str | torch.dtype,
    device: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    role: str = "target",
):
    """Loads a target and its tokenizer by path or Hub id; `demo` is the built-in pair's target.

    Args:
        name (`str`), dtype (`str` or `torch.dtype`): see [`resolve_dtype`].
        device (`str`, *optional*): default: the accelerator, or the CPU.
        revision (`str`, *optional*): branch, tag or commit of the Hub repository.
        trust_remote_code (`bool`): run the repository's own code.
        device_map (`str`, *optional*): replaces `device`, see [`resolve_device_map`].
        role (`str`): the option that named the target, for messages.

    Raises:
        OSError: if it cannot be found.
        ValueError: for a revision of a folder, untrusted code, or a device or dtype that does not exist.
    """
    places = None if device_map is None else resolve_device_map(device_map)
    place = resolve_device(places.get(""), "device_map") if isinstance(places, dict) else resolve_device(device)
    resolved = resolve_dtype(dtype, place) if isinstance(dtype, str) else dtype
    if name == DEMO:
        model, tokenizer = demo.load_target(resolved)
    else:
        how = {} if places is None else {"device_map": places}
        with _named(role, name, revision):
            check_is_target(name, role, revision)
            commit, at = _pin(name, revision)
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(
                    name, dtype=resolved, trust_remote_code=trust_remote_code, **at, **how
                ),
                AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **at),
            )
        model.config._commit_hash = commit
    model = model.eval()
    if places is None:
        return model.to(place), tokenizer
    _check_placed(model, places)
    return model, tokenizer


def load_target_config(name: str, revision: str | None = None):
    """Loads a target's config by path or Hub id, without its weights."""
    with _named("target", name, revision):
        check_is_target(name, revision=revision)
        commit, at = _pin(name, revision)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **at)
    config._commit_hash = commit
    return config


def load_target_ends(name: str, dtype: str, revision: str | None = None, trust_remote_code: bool = False):
    """Loads only a target's config, embedding and head. Its other modules have no weights.

    The whole target is loaded if these tensors are not found by name in safetensors (a quantised target, other names on
    file), or if the repository's code must run.
    """
    resolved = resolve_dtype(dtype, torch.device("cpu"))
    if name != DEMO and not trust_remote_code:
        with contextlib.suppress(OSError, LookupError, ValueError, SafetensorError):
            return _read_ends(name, resolved, revision)
    return load_target(name, dtype, "cpu", revision=revision, trust_remote_code=trust_remote_code)[0]


def _read_ends(name: str, dtype: torch.dtype, revision: str | None):
    """Raises `LookupError` if a tensor is not on file under its name in the model."""
    config = load_target_config(name, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise LookupError(f"{name} is quantised")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = {id(module): (path, module) for path, module in model.named_modules()}
    ends = [modules[id(part)] for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    if ends[0][1].weight is ends[1][1].weight:  # tied: stored once
        ends[1] = (ends[0][0], ends[1][1])
    at = {"revision": config._commit_hash or revision}
    index = cached_file(name, f"{WEIGHTS_FILE}.index.json", _raise_exceptions_for_missing_entries=False, **at)
    shards = None if index is None else check_index(index, read_json(index))
    for path, module in ends:
        key = f"{path}.weight"
        file = cached_file(name, WEIGHTS_FILE if shards is None else shards[key], **at)
        with safe_open(file, framework="pt") as stored:
            if key not in stored.keys():  # noqa: SIM118  (no mapping)
                raise LookupError(f"{file} contains no {key}")
            tensor = stored.get_tensor(key)
        if tensor.shape != module.weight.shape:
            raise LookupError(f"{key} is {list(tensor.shape)}, not {list(module.weight.shape)}")
        module.weight = torch.nn.Parameter(tensor.to(dtype), requires_grad=False)
    return model.eval()


def _pin(name: str, revision: str | None) -> tuple[str | None, dict[str, str]]:
    """The current commit of a branch, tag or None (None for a folder), and the argument of `from_pretrained` for it.

    All files of a load then come from one commit, which is stored in the config for [`hub_commit`].
    """
    path = (
        None
        if Path(name).is_dir()
        else cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    )
    commit = extract_commit_hash(path, None)
    at = commit or revision
    return commit, {} if at is None else {"revision": at}


def _check_placed(model: Any, places: str | dict[str, Any]) -> None:
    """Rejects a map with unknown modules, or without a device for modules that each step needs.

    Raises:
        ValueError: with the names of the modules.
    """
    if isinstance(places, dict):
        known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        if strange := [name for name in places if name not in known]:
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"--device_map names {', '.join(strange)}, which this target does not have; its parts are {top}."
            )
    ends = {"embedding": model.get_input_embeddings(), "LM head": model.get_output_embeddings()}
    for name, module in ends.items():
        # a tied head may be offloaded although its weight is on a device
        offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        if module is not None and (offloaded or module.weight.device.type == "meta"):
            raise ValueError(
                f"--device_map leaves the target's {name} without a device (offloaded), but every step needs it: give a JSON "
                "object with a device for it."
            )


def resolve_device_map(text: str) -> str | dict[str, Any]:
    """`'auto'` and accelerate's other strategies unchanged, `'cuda:1'` -> `{"": "cuda:1"}`, a JSON object as a dict.

    Raises:
        ValueError: for anything else, and for devices that do not exist.
    """
    if text in _STRATEGIES:
        return text
    if not text.lstrip().startswith("{"):
        return {"": str(resolve_device(text, "device_map"))}
    try:
        places = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--device_map {text!r} is not a JSON object: {error}.") from error
    if not places or not all(type(place) in (int, str) for place in places.values()):
        raise ValueError(f'--device_map {text!r}: each module needs a device, for example 0 or "cpu".')
    for place in places.values():
        if place != "disk":  # accelerate's name for weights that are read again for each forward pass
            resolve_device(place, "device_map")
    return places


def resolve_device(name: str | int | None, option: str = "device") -> torch.device:
    """`'cuda:1'` -> its device; None -> the machine's accelerator, or the CPU; `ValueError` for missing devices."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it contains no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--{option} {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu."
        ) from error
    return device


def load_drafter(name: str, revision: str | None = None):
    """Loads a drafter by path or Hub id, at a branch, tag or commit; `demo` is the shipped drafter."""
    if name == DEMO:
        if revision is not None:
            raise ValueError(
                f"--drafter_revision {revision} is for a drafter on the Hub, but 'demo' has only one version: leave it out."
            )
        return demo.load_drafter()
    with _named("drafter", name, revision):
        check_is_drafter(name, revision)
        commit, at = _pin(name, revision)
        drafter = CoralDraftModel.from_pretrained(name, dtype="auto", **at).eval()
    drafter.config._commit_hash = commit
    return drafter


@contextlib.contextmanager
def _named(role: str, name: str, revision: str | None = None):
    """Names the model that could not be loaded. Transformers takes a missing folder for a Hub id, and blames the Hub."""
    if Path(name).is_file():
        raise ValueError(f"--{role} {name} is a file; give the folder that contains config.json and the weights.")
    if revision is not None and Path(name).is_dir():
        raise ValueError(
            f"--{role}_revision {revision}: --{role} {name} is a folder, which has no revisions. Leave it out, or give the "
            "Hub id."
        )
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise OSError(f"--{role} {name}: {error}") from error
        at = "" if revision is None else f" at --{role}_revision {revision}"
        raise OSError(
            f"--{role} {name} is not a folder here, and could not be loaded from the Hub under that id{at}: check the path, or "
            f"the spelling and your access. ({error})"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"--{role} {name} needs Python code from its repository, which would run on this machine. Read it, and "
            "add --trust_remote_code true if you trust it."
        ) from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`'bfloat16'` or `'bf16'` -> `torch.bfloat16`; `'auto'` -> bfloat16 if `device` multiplies it natively, else float32.

    Raises:
        ValueError: if it is not a floating-point dtype.
    """
    name = name.removeprefix("torch.")
    name = _DTYPES.get(name.lower(), name)
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype {name!r} is unknown; use auto, bfloat16, float16 or float32.")
    return dtype


def require(*modules: str, extra: str = "eval") -> None:
    """Raises `ImportError` for missing packages of an extra, before a run instead of after it."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"This verb needs {' and '.join(missing)}: pip install 'coral-hf[{extra}]'.")
