"""What several verbs load, by the names given on the command line."""

import contextlib
import importlib.util
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from .. import demo
from ..hardware import default_device, native_bfloat16
from ..jsonl import read_json
from ..modeling_coral import CoralDraftModel
from ..weight_files import WEIGHTS_FILE, check_index


DEMO = "demo"


def load_target(name: str, dtype: str | torch.dtype, device: str | None = None):
    """A target and its tokenizer by path or Hub id; `demo` is the embedded one. `device` None: the accelerator."""
    place = resolve_device(device)
    resolved = resolve_dtype(dtype, place) if isinstance(dtype, str) else dtype
    if name == DEMO:
        model, tokenizer = demo.load_target(resolved)
    else:
        with _named("target", name):
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(name, dtype=resolved),
                AutoTokenizer.from_pretrained(name),
            )
    return model.eval().to(place), tokenizer


def load_target_config(name: str):
    """A target's config by path or Hub id, without its weights."""
    with _named("target", name):
        return AutoConfig.from_pretrained(name)


def load_target_ends(name: str, dtype: str):
    """A target for what asks for its config, embedding and head alone: those are read, the rest has no weights.

    Where they are not found by name in safetensors (a quantised target, other names on file), the whole target is loaded.
    """
    resolved = resolve_dtype(dtype, torch.device("cpu"))
    if name != DEMO:
        with contextlib.suppress(OSError, LookupError, ValueError, SafetensorError):
            return _read_ends(name, resolved)
    return load_target(name, dtype, "cpu")[0]


def _read_ends(name: str, dtype: torch.dtype):
    """Raises `LookupError` where a tensor is not on file under its name in the model."""
    config = load_target_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise LookupError(f"{name} is quantised")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = {id(module): (path, module) for path, module in model.named_modules()}
    ends = [modules[id(part)] for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    if ends[0][1].weight is ends[1][1].weight:  # tied: on file once
        ends[1] = (ends[0][0], ends[1][1])
    index = cached_file(name, f"{WEIGHTS_FILE}.index.json", _raise_exceptions_for_missing_entries=False)
    shards = None if index is None else check_index(index, read_json(index))
    for path, module in ends:
        key = f"{path}.weight"
        file = cached_file(name, WEIGHTS_FILE if shards is None else shards[key])
        with safe_open(file, framework="pt") as stored:
            if key not in stored.keys():  # noqa: SIM118  (no mapping)
                raise LookupError(f"{file} holds no {key}")
            tensor = stored.get_tensor(key)
        if tensor.shape != module.weight.shape:
            raise LookupError(f"{key} is {list(tensor.shape)}, not {list(module.weight.shape)}")
        module.weight = torch.nn.Parameter(tensor.to(dtype), requires_grad=False)
    return model.eval()


def resolve_device(name: str | None) -> torch.device:
    """`'cuda:1'` -> its device; None -> the machine's accelerator, else the CPU; `ValueError` for what is not there."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu.") from error
    return device


def load_drafter(name: str):
    """A drafter by path or Hub id; `demo` is the shipped one."""
    if name == DEMO:
        return demo.load_drafter()
    with _named("drafter", name):
        return CoralDraftModel.from_pretrained(name, dtype="auto").eval()


@contextlib.contextmanager
def _named(role: str, name: str):
    """Says which model could not be loaded; Transformers takes a missing folder for a Hub id, and speaks of the Hub."""
    if Path(name).is_file():
        raise ValueError(f"--{role} {name} is a file; give the folder that holds config.json and the weights.")
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise OSError(f"--{role} {name}: {error}") from error
        raise OSError(
            f"--{role} {name} is no folder here, and could not be loaded from the Hub under that id: check the path, or "
            f"the spelling and your access. ({error})"
        ) from error


def check_output_folder(path: str) -> None:
    """Raises `ValueError` where a folder to write is a file, before a run instead of after it."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"--output {path} is a file; give a folder, new or existing.")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`'bfloat16'` -> `torch.bfloat16`; `'auto'`: bfloat16 where `device` multiplies it natively, else float32.

    Raises:
        ValueError: for what is no floating-point dtype.
    """
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype {name!r} is unknown; use auto, bfloat16, float16 or float32.")
    return dtype


def require(*modules: str) -> None:
    """Raises `ImportError` for what the eval extra brings, before a run instead of after it."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"This verb needs {' and '.join(missing)}: pip install 'coral-hf[eval]'.")
