"""Functions that are compiled once per set of shapes and cached on the model that they run."""

import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch


# In the model's `__dict__`, not among its modules, so that it is never saved, moved or trained with the model.
_NAME = "_coral_graphs"
_lock = threading.Lock()


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, independent of all other compilations of the same code.

    PyTorch counts and limits recompilations per code object. Here each set of shapes gets its own code object. Any
    recompilation is therefore a mistake, and compiled shapes do not evict each other.

    Args:
        function (`Callable`)
        options (`dict`): keyword arguments of `torch.compile`.

    Raises:
        ValueError: on the first call, if the code cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # this import takes a second, so only compiled calls make it

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
                "draft_compile=False, or compile the target in parts with compile_config=CompileConfig(fullgraph=False)."
            ) from error

    return run


class _Kept(dict):
    """The compiled functions of a model. Copies and pickles of the model start without any."""

    def __deepcopy__(self, memo: dict) -> "_Kept":
        return _Kept()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Kept, ()


def take(model: torch.nn.Module, key: Hashable, partner: torch.nn.Module, make: Callable[[], Any]) -> Any:
    """Takes the graphs of an earlier call, or makes new ones. They own buffers, so that one call at a time has them.

    Args:
        model (`nn.Module`): the model that they are cached on.
        key (`Hashable`): shapes, settings and everything else that the graphs depend on.
        partner (`nn.Module`): the other model that they run. Graphs of another partner are not reused.
        make (`Callable`): makes new graphs.
    """
    with _lock:
        kept = model.__dict__.setdefault(_NAME, _Kept())
        known, found = kept.pop(key, (None, None))
    return found if known is not None and known() is partner else make()


def put_back(model: torch.nn.Module, key: Hashable, partner: torch.nn.Module, graphs: Any) -> None:
    """Returns graphs to the cache, for later calls with the same key."""
    with _lock:
        model.__dict__.setdefault(_NAME, _Kept())[key] = weakref.ref(partner), graphs


def forget(model: torch.nn.Module) -> None:
    """Frees everything that was compiled for a model."""
    with _lock:
        model.__dict__.pop(_NAME, None)


__all__ = ["compiled", "forget", "put_back", "take"]
