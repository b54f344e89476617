"""Excludes Transformers' hooks for hidden states from a target's copies and pickles.

The first forward pass that returns hidden states permanently adds a local function as a hook to every layer. A model with
such hooks cannot be pickled (`torch.save(model)`, a spawned process).
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


_FLAG = "_output_capturing_hooks_installed"
_MODULE = "transformers.utils.output_capturing"


class _Hooks(OrderedDict):
    """The hooks of a layer. Copies and pickles lack Transformers' own, which it installs again when needed."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if not _is_capturing(hook)],)


class _Installed:
    """A flag that the hooks are installed. A copy of it is False."""

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> Any:
        return bool, (False,)


_INSTALLED = _Installed()


def _is_capturing(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _MODULE


def leave_out_of_copies(model: nn.Module) -> None:
    """Allows a model to be copied and pickled without its hooks. The hooks stay installed and work as before."""
    for module in model.modules():
        hooks = module._forward_hooks
        # A layer with a user's own hooks stays unchanged, because their handles refer to the current dict.
        if type(hooks) is OrderedDict and hooks and all(map(_is_capturing, hooks.values())):
            module._forward_hooks = _Hooks(hooks)
        if vars(module).get(_FLAG) is True:
            setattr(module, _FLAG, _INSTALLED)


@contextmanager
def copied_without_hooks(model: nn.Module) -> Iterator[None]:
    """Calls [`leave_out_of_copies`] after the block, even if it fails."""
    try:
        yield
    finally:
        leave_out_of_copies(model)


__all__ = ["copied_without_hooks", "leave_out_of_copies"]
