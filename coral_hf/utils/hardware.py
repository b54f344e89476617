"""The machine's devices, and the dtypes that they compute natively."""

import platform
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch


def default_device() -> torch.device:
    """The machine's accelerator, or the CPU, also for a CUDA build of torch without a GPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@cache
def cpu_name() -> str:
    """The CPU's model name from the operating system."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of a GPU or CPU, or only the type of other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else f"{device.type} {platform.machine()}"


def synchronized_clock(devices: Iterable[torch.device]) -> float:
    """Seconds of a clock that first waits for all devices to finish. A CPU has finished when a call returns."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return time.perf_counter()


def native_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether a device (None: the accelerator or the CPU) multiplies bf16 faster than float32.

    CPUs without AVX-512 or AMX use plain loops, which are much slower than float32 except for single rows.
    """
    kind = default_device() if device is None else torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_one_device(target: Any) -> None:
    """Raises `ValueError` if a `device_map` spread the target over several devices, because losses and continuous batching
    need one device."""
    devices = {str(device) for device in (getattr(target, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"The target lies on several devices ({', '.join(sorted(devices))}): load it without a device_map, or with one "
            'device in it (device_map={"": 0}). For a target that is too large for one device, train with several processes '
            "and shard_target=True (--shard_target true), and let a serving engine answer the prompts (--endpoint)."
        )


__all__ = ["check_one_device", "cpu_name", "default_device", "device_name", "native_bfloat16", "synchronized_clock"]
