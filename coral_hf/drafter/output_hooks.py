"""Transformers' hooks for hidden states, left out of a target's copies and pickles.

The first forward that returns hidden states gives every layer a hook that is a local function, for good. A model with such
hooks can be neither pickled (`torch.save(model)`, a spawned process) nor sent anywhere.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


_FLAG = "_output_capturing_hooks_installed"
_MODULE = "transformers.utils.output_capturing"


class _Hooks(OrderedDict):
    """The hooks of a layer, whose copies and pickles are without Transformers' own: it installs them again where needed."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if not _is_capturing(hook)],)


class _Installed:
    """Says that the hooks are installed; a copy of it says that they are not."""

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> Any:
        return bool, (False,)


_INSTALLED = _Installed()


def _is_capturing(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _MODULE


def leave_out_of_copies(model: nn.Module) -> None:
    """Lets a model be copied and pickled without the hooks that it has; they stay in place and work as before."""
    for module in model.modules():
        hooks = module._forward_hooks
        # A layer with hooks of a user's own stays as it is: their handles remove them from the dict that they know.
        if type(hooks) is OrderedDict and hooks and all(map(_is_capturing, hooks.values())):
            module._forward_hooks = _Hooks(hooks)
        if vars(module).get(_FLAG) is True:
            setattr(module, _FLAG, _INSTALLED)


@contextmanager
def copied_without_hooks(model: nn.Module) -> Iterator[None]:
    """[`leave_out_of_copies`] after whatever ran the model's forward, also where that fails."""
    try:
        yield
    finally:
        leave_out_of_copies(model)


__all__ = ["copied_without_hooks", "leave_out_of_copies"]
