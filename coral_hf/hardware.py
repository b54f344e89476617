"""What the machine computes fast."""

import torch


def default_device() -> torch.device:
    """The machine's accelerator, or the CPU: also where torch is a CUDA build and there is no GPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def native_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether a device (None: the accelerator, else the CPU) multiplies bf16 faster than float32.

    CPUs without AVX-512 or AMX fall back to plain loops, far slower than float32 for all but single rows.
    """
    kind = default_device() if device is None else torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


__all__ = ["default_device", "native_bfloat16"]
