"""What the machine computes fast."""

import torch


def native_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether a device (None: the accelerator, else the CPU) multiplies bf16 faster than float32.

    CPUs without AVX-512 or AMX fall back to plain loops, far slower than float32 for all but single rows.
    """
    kind = torch.accelerator.current_accelerator() if device is None else torch.device(device)
    if kind is not None and kind.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind is not None and kind.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


__all__ = ["native_bfloat16"]
