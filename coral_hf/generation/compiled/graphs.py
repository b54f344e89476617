"""Functions compiled once for each set of shapes, and kept beside the model that they run."""

import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch


# In the model's `__dict__`, not among its modules: never saved, moved or trained with it.
_NAME = "_coral_graphs"
_lock = threading.Lock()


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, apart from all other compilations of the same code.

    PyTorch counts recompilations, and limits them, by code object. Here each set of shapes is a function of its own, so that
    any recompilation is a mistake, and none takes another's place.

    Args:
        function (`Callable`)
        options (`dict`): keyword arguments of `torch.compile`.

    Raises:
        ValueError: when it is called, if the code cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second, which only those who compile spend

    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    graph = torch.compile(own, **options)

    def run(*args: Any) -> Any:
        try:
            return graph(*args)
        except TorchDynamoException as error:
            raise ValueError(
                f"draft_compile=True, but PyTorch cannot compile the models' forward: {str(error).splitlines()[0]}. Set "
                "draft_compile=False, or let it compile the target in parts with compile_config=CompileConfig(fullgraph=False)."
            ) from error

    return run


class _Kept(dict):
    """What was compiled for a model. Copies and pickles of the model begin with nothing."""

    def __deepcopy__(self, memo: dict) -> "_Kept":
        return _Kept()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Kept, ()


def take(model: torch.nn.Module, key: Hashable, partner: torch.nn.Module, make: Callable[[], Any]) -> Any:
    """What was kept of an earlier call, or a new one; nobody else has it until [`put_back`]: it owns buffers.

    Args:
        model (`nn.Module`): beside which it is kept.
        key (`Hashable`): shapes, settings, and all else that the graphs depend on.
        partner (`nn.Module`): the other model that they run: with another one they are of no use.
        make (`Callable`): makes what is kept.
    """
    with _lock:
        kept = model.__dict__.setdefault(_NAME, _Kept())
        known, found = kept.pop(key, (None, None))
    return found if known is not None and known() is partner else make()


def put_back(model: torch.nn.Module, key: Hashable, partner: torch.nn.Module, graphs: Any) -> None:
    """Keeps it for later calls with the same key."""
    with _lock:
        model.__dict__.setdefault(_NAME, _Kept())[key] = weakref.ref(partner), graphs


def forget(model: torch.nn.Module) -> None:
    """Drops all that was compiled for a model, and its memory."""
    with _lock:
        model.__dict__.pop(_NAME, None)


__all__ = ["compiled", "forget", "put_back", "take"]
