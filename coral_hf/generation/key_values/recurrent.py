"""States of recurrent layers (Mamba, gated delta nets, short convolutions) during verification.

A state is a sum over all tokens read so far, so that no token can be removed from it. Moreover, many modules compute several
tokens after a state differently from single steps: those of Nemotron-H and Zamba2 clamp the time steps, and Jamba's starts
without the state. During verification, these modules therefore read the draft tree one level at a time, as plain decoding
reads single tokens. Each node is read after the state of its parent. The states of all nodes are kept until acceptance is
known. Projections before and after the recurrence are still computed for all nodes at once.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache as remembered
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..draft_tree import DraftTree
from .recurrent_layers import UPDATES, fit_convolutions, is_linear, is_recurrent, recurrent_modules
from .tree_levels import TreeLevel, joined_levels, of_level, tree_levels


_States = dict[tuple[str, int], torch.Tensor]  # states of a layer by attribute and index, each [places, ...]
_here = threading.local()  # .steps: the RecurrentStates of this thread's verification pass
_lock = threading.Lock()
_users: Counter[nn.Module] = Counter()  # running verification passes that use a module


class RecurrentStates:
    """The states of a cache's recurrent layers over a series of verification passes, for any number of rows.

    Args:
        target (`PreTrainedModel`): a target that passes [`recurrent_layers.check_recurrence`].
        cache (`Cache`): a dynamic cache after the prefill.
    """

    def __init__(self, target: PreTrainedModel, cache: Cache):
        self.cache = cache
        self.layers = {index: layer for index, layer in enumerate(cache.layers) if is_linear(layer)}
        self._modules = {index: modules[0] for index, modules in recurrent_modules(target).items()}
        self._recurrent = [index for index, layer in self.layers.items() if is_recurrent(layer)]
        for index, layer in self.layers.items():
            if not getattr(layer, "is_sliding", False):  # a sliding window next to the states always records its past
                # without a record, recurrent layers convolve as in plain decoding
                layer.record_past = index not in self._recurrent
        # for each class of module: its last linear layer, and the linear layers that read its input
        self._last: dict[type[nn.Module], str | None] = {}
        self._first: dict[type[nn.Module], set[str]] = {}
        # of the current or last forward pass
        self._levels: list[TreeLevel] = []
        self._count = 0  # nodes per row
        self._before: dict[int, _States] = {}
        self._after: dict[int, list[_States]] = {}

    @contextmanager
    def stepping(self, tree: DraftTree) -> Iterator[None]:
        """Context for a target forward pass over the nodes `[n, N]` of every row. Call [`keep`] afterwards."""
        self._levels, self._count = tree_levels(tree), tree.num_nodes
        # For chains, convolutions record their inputs until the crop. In a tree, nodes have different inputs before them.
        stepped = self._recurrent if tree.is_chain else list(self.layers)
        self._before = {index: _states(self.layers[index]) for index in stepped}
        self._after = {}
        modules = [self._modules[index] for index in stepped]
        with _lock:
            for module in modules:
                _users[module] += 1
                if _users[module] == 1:
                    kind: Any = type(module)
                    module.__class__ = _stepping(kind)
        _here.steps = self
        try:
            yield
        finally:
            _here.steps = None
            with _lock:
                for module in modules:
                    _users[module] -= 1
                    if not _users[module]:
                        del _users[module]
                        module.__class__ = type(module).__mro__[1]

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Sets the states to those after the accepted nodes of the last forward pass.

        Args:
            paths (`Sequence[Sequence[int]]`): each row's accepted nodes, root first. An empty path restores the states before.
        """
        # for each row: the level of the last accepted node, counted from 1, and its place in that level
        ends = []
        for row, path in enumerate(paths):
            level = len(path)
            ends.append((level, self._levels[level - 1].places[row, path[-1]] if path else row))
        depths = {level for level, _ in ends}
        for index, before in self._before.items():
            after = [before, *self._after[index]]
            places = [place for _, place in ends]
            if len(depths) == 1:
                (level,) = depths
                states = after[level]
                if places != list(range(len(next(iter(states.values()))))):
                    states = {name: state[places] for name, state in states.items()}
            else:
                states = {
                    name: torch.cat([after[level][name][place : place + 1] for level, place in ends])
                    for name in before
                }
            _set_states(self.layers[index], states)
        self._before, self._after = {}, {}

    # Within the target's forward pass ---------------------------------------------------------------------------

    def step(self, module: nn.Module, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The outputs `[n, N, ...]` of a recurrent module, level by level, each node after its parent's state."""
        index: Any = module.layer_idx
        layer = self.layers[index]
        # no node is padding
        kwargs = {name: None if "mask" in name else value for name, value in kwargs.items()}
        projected = self._project(module, kind, args, kwargs) if len(self._levels) > 1 else {}
        last = self._last.get(kind)
        states, after, found = self._before[index], [], []
        for number, level in enumerate(self._levels):
            _set_states(layer, {name: level.behind(state) for name, state in states.items()})
            children: dict[str, Any] = {name: _Known(output, level) for name, output in projected.items()}
            if last is not None:
                children[last] = _identity
            elif not number:
                children = {**children, **_spies(module, children)}
            inputs = of_level(args, level, self._count), of_level(kwargs, level, self._count)
            output = kind.forward(_with_children(module, kind, children), *inputs[0], **inputs[1])
            if not number and last is None:
                names = (
                    name for name, child in children.items() if isinstance(child, _Spy) and child.output is output
                )
                self._last[kind] = next(names, None)
                given = inputs[0][0] if inputs[0] else inputs[1].get("hidden_states")
                spies = {name: child for name, child in children.items() if isinstance(child, _Spy)}
                self._first[kind] = {name for name, spy in spies.items() if spy.given is given}
            fit_convolutions(layer)
            states = _states(layer)
            after.append(states)
            found.append(output)
        self._after[index] = after
        joined = joined_levels(found, self._levels)
        return joined if last is None else getattr(module, last)(joined)

    def _project(self, module: nn.Module, kind: type[nn.Module], args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
        """Outputs of a module's linear layers for all nodes: of those before it writes a state, and those that read its input."""
        spies = _spies(module, {})
        stopping = _Stopping(self.cache)

        def without_cache(value: Any) -> Any:
            return stopping if value is self.cache else value

        kwargs = {name: without_cache(value) for name, value in kwargs.items()}
        with suppress(_Stopped):
            kind.forward(_with_children(module, kind, spies), *map(without_cache, args), **kwargs)
        known = {name: spy.output for name, spy in spies.items() if spy.calls == 1}
        for name in self._first.get(kind, set()) - known.keys():
            known[name] = getattr(module, name)(args[0] if args else kwargs["hidden_states"])
        return {name: output for name, output in known.items() if output.ndim > 2 and output.shape[1] == self._count}


def _states(layer: Any) -> _States:
    found = {
        (name, index): state
        for name in ("conv_states", "recurrent_states")
        for index, state in getattr(layer, name).items()
    }
    return {name: state for name, state in found.items() if state is not None}


def _set_states(layer: Any, states: _States) -> None:
    for (name, index), state in states.items():
        getattr(layer, name)[index] = state


# Replacements of parts of a module --------------------------------------------------------------------------------


@remembered
def _stepping(kind: Any) -> type[nn.Module]:
    """The class of a module during verification. For threads that verify nothing it behaves like the original class."""

    class Stepping(kind):
        @wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            steps = getattr(_here, "steps", None)
            return kind.forward(self, *args, **kwargs) if steps is None else steps.step(self, kind, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles are ordinary modules
            return object.__new__, (kind,), self.__dict__

    Stepping.__name__ = Stepping.__qualname__ = kind.__name__
    return Stepping


def _with_children(module: nn.Module, kind: type[nn.Module], children: dict[str, Any]) -> nn.Module:
    """A view of the module with the same weights, in which some children are replaced."""
    other = object.__new__(kind)
    other.__dict__.update(module.__dict__)
    other.__dict__["_modules"] = {**module._modules, **children}
    return other


class _Child:
    """Replaces a linear layer. Everything except its call is delegated to the layer."""

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Spy(_Child):
    """Keeps the layer's outputs and counts its calls."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.given: Any = None
        self.output: Any = None
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        self.given, self.output = args[0], self.module(*args)
        return self.output


class _Known:
    """Replaces a linear layer whose outputs are already known."""

    def __init__(self, outputs: torch.Tensor, level: TreeLevel):
        self.outputs, self.level = outputs, level

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.level.of(self.outputs)


def _spies(module: nn.Module, known: dict[str, Any]) -> dict[str, _Spy]:
    """Replacements for all linear layers without known outputs, including quantised ones and those with adapters."""
    return {
        name: _Spy(child)
        for name, child in module.named_children()
        if hasattr(child, "out_features") and name not in known
    }


def _identity(value: torch.Tensor) -> torch.Tensor:
    return value


class _Stopped(Exception):
    """Raised when a module is about to write a state."""


class _Stopping:
    """A cache that can be read and interrupts any module that writes to it."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        if name in UPDATES:
            raise _Stopped
        return getattr(self.cache, name)


__all__ = ["RecurrentStates"]
