"""Linear layers over a few rows on a CPU, which take most of the time of drafting and verifying a tree.

For 2 to 32 rows of float32, MKL computes `x @ weight.T` more slowly than the transposed product `weight @ x.T`, which it
splits into blocks of 4 and 8 rows. This was measured on AVX2 with two threads and is used nowhere else. One thread gains
nothing, one row is memory-bound in both forms, and more rows are equally fast in the plain form.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


_MOST_ROWS = 32
# Outputs that are computed at a time for more than 8 rows. A larger transposed product leaves the cache before it is transposed
# back: with 49,152 outputs and 16 rows, blocks took 13 ms and one product 18 ms (AVX2, two threads).
_MOST_OUTPUTS = 4096
_lock = threading.Lock()
# The number of CPU threads when `few_row_linears` was last entered, as a constant, because a graph cannot query it.
_threads = 1
# The number of calls that currently use the layers of `few_row_linears`.
_users: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


# Only where it was measured: MKL without AVX-512. A constant, so that a compiled graph can read it.
_TRANSPOSED_IS_FASTER = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def few_row_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` in the form that is fastest on the CPU. On other devices and with gradients, this is `F.linear` itself.

    Args:
        x (`torch.Tensor` of shape `[..., in]`).
        weight (`torch.Tensor` of shape `[out, in]`).
        bias (`torch.Tensor` of shape `[out]`, *optional*).

    Returns:
        `torch.Tensor` of shape `[..., out]`.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if (
        not 1 < rows <= _MOST_ROWS
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.device.type != "cpu"
        or torch.is_grad_enabled()
        or (_threads if torch.compiler.is_compiling() else torch.get_num_threads()) == 1
        or not _TRANSPOSED_IS_FASTER
    ):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)  # [rows, in]
    block = 4 if rows <= 4 else 8
    if padding := -rows % block:
        flat = F.pad(flat, (0, 0, 0, padding))
    # Contiguous: attention has no fast path for anything else.
    if rows <= 8 or len(weight) <= _MOST_OUTPUTS:
        product = (weight @ flat.t())[:, :rows].t().contiguous()  # [rows, out]
    else:
        product = flat.new_empty(rows, len(weight))
        for start in range(0, len(weight), _MOST_OUTPUTS):
            stop = min(start + _MOST_OUTPUTS, len(weight))
            product[:, start:stop] = (weight[start:stop] @ flat.t())[:, :rows].t()
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], -1)


@contextmanager
def few_row_linears(*models: nn.Module) -> Iterator[None]:
    """Context in which the models' float32 `nn.Linear` layers on a CPU run as [`few_row_linear`], also in other threads.

    Afterwards the layers are restored. Wrapped layers (Accelerate's hooks), weights that are not plain tensors (quantised or
    sharded) and compiled layers are not changed.
    """
    global _threads
    with _lock:
        _threads = torch.get_num_threads()
        layers = _layers(models) if _TRANSPOSED_IS_FASTER else []
        for layer in layers:
            _users[layer] = _users.get(layer, 0) + 1
            if _users[layer] == 1:
                layer.__class__ = _FewRowLinear
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                _users[layer] -= 1
                if not _users[layer]:
                    del _users[layer]
                    if type(layer) is _FewRowLinear:  # its class has not been changed in the meantime
                        layer.__class__ = nn.Linear  # type: ignore[assignment]


class _FewRowLinear(nn.Linear):
    """The class of a layer during a call. Copies and pickles made by other threads in the meantime are plain layers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return few_row_linear(input, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (nn.Linear,), self.__getstate__()


def _layers(models: tuple[nn.Module, ...]) -> list[nn.Linear]:
    found: dict[nn.Linear, None] = {}
    for model in models:
        compiled = {layer for part in model.modules() if is_compiled(part) for layer in part.modules()}
        for layer in model.modules():
            if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, _FewRowLinear):
                continue
            if layer in compiled or "forward" in vars(layer):
                continue
            # A subclass may report float32 but multiply differently.
            if not all(
                type(tensor) in (nn.Parameter, torch.Tensor)
                for tensor in (layer.weight, layer.bias)
                if tensor is not None
            ):
                continue
            if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
                found[layer] = None
    return list(found)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module or its forward is compiled, or its method `compile` was called. Changed layers would recompile it."""
    forward = vars(module).get("forward")
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


__all__ = ["few_row_linear", "few_row_linears", "is_compiled"]
