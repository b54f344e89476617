"""States of recurrent layers (Mamba, gated delta nets, short convolutions) while drafts are verified.

A state is a sum over all tokens that were read: none can be taken out of it. And where a module reads several tokens after
a state, its form of the recurrence is another than plain decoding's: Nemotron-H's and Zamba2's clamps the time steps, Jamba's
begins without the state. So within a verify forward these modules, and only they, read one level of the draft tree after the
other, as plain decoding does, each node after the state of its parent. The states of all nodes are kept until it is known
which of them are accepted. Projections before and after the recurrence are products over all nodes at once.
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


_States = dict[tuple[str, int], torch.Tensor]  # of a layer, by attribute and index, each [places, ...]
_here = threading.local()  # .steps: the RecurrentStates of the verify forward that this thread runs
_lock = threading.Lock()
_users: Counter[nn.Module] = Counter()  # verify forwards that a module takes part in at this moment


class RecurrentStates:
    """The states of a cache's recurrent layers over one verify forward after the other, for any number of rows.

    Args:
        target (`PreTrainedModel`): one that [`recurrent_layers.check_recurrence`] lets pass.
        cache (`Cache`): dynamic, after the prefill.
    """

    def __init__(self, target: PreTrainedModel, cache: Cache):
        self.cache = cache
        self.layers = {index: layer for index, layer in enumerate(cache.layers) if is_linear(layer)}
        self._modules = {index: modules[0] for index, modules in recurrent_modules(target).items()}
        self._recurrent = [index for index, layer in self.layers.items() if is_recurrent(layer)]
        for index, layer in self.layers.items():
            if not getattr(layer, "is_sliding", False):  # a window beside the states records its past in any case
                # without a record recurrent layers convolve as plain decoding does
                layer.record_past = index not in self._recurrent
        # of each kind of module the linear layer that it ends with, and those that read what it is given
        self._last: dict[type[nn.Module], str | None] = {}
        self._first: dict[type[nn.Module], set[str]] = {}
        # of the forward that runs or ran last
        self._levels: list[TreeLevel] = []
        self._count = 0  # nodes of each row
        self._before: dict[int, _States] = {}
        self._after: dict[int, list[_States]] = {}

    @contextmanager
    def stepping(self, tree: DraftTree) -> Iterator[None]:
        """Surrounds a forward of the target over the nodes `[n, N]` of every row; [`keep`] follows it."""
        self._levels, self._count = tree_levels(tree), tree.num_nodes
        # A chain's convolutions record their inputs until the crop; a tree's have other inputs before them.
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
        """Leaves the states as they are after the accepted nodes of the forward.

        Args:
            paths (`Sequence[Sequence[int]]`): of each row, root first; an empty one leaves the states as they were before.
        """
        # of each row: the level of the last accepted node, counted from 1, and its place there
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

    # What runs within the target's forward ----------------------------------------------------------------------

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
        """What a module's linear layers make of all nodes: those before it writes a state, and those that read its input."""
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


# What replaces parts of a module ----------------------------------------------------------------------------------


@remembered
def _stepping(kind: Any) -> type[nn.Module]:
    """The class that a module has while drafts are verified; for threads that verify none it is the module's own."""

    class Stepping(kind):
        @wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            steps = getattr(_here, "steps", None)
            return kind.forward(self, *args, **kwargs) if steps is None else steps.step(self, kind, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:  # its copies and pickles are plain modules
            return object.__new__, (kind,), self.__dict__

    Stepping.__name__ = Stepping.__qualname__ = kind.__name__
    return Stepping


def _with_children(module: nn.Module, kind: type[nn.Module], children: dict[str, Any]) -> nn.Module:
    """The module, with the same weights and other children in the place of some."""
    other = object.__new__(kind)
    other.__dict__.update(module.__dict__)
    other.__dict__["_modules"] = {**module._modules, **children}
    return other


class _Child:
    """In the place of a linear layer; everything but its call is the layer's."""

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Spy(_Child):
    """Keeps what the layer returned, and counts the calls."""

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
    """In the place of a linear layer whose outputs are known."""

    def __init__(self, outputs: torch.Tensor, level: TreeLevel):
        self.outputs, self.level = outputs, level

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.level.of(self.outputs)


def _spies(module: nn.Module, known: dict[str, Any]) -> dict[str, _Spy]:
    """For every linear layer, quantised or with an adapter or not, that is not known yet."""
    return {
        name: _Spy(child)
        for name, child in module.named_children()
        if hasattr(child, "out_features") and name not in known
    }


def _identity(value: torch.Tensor) -> torch.Tensor:
    return value


class _Stopped(Exception):
    """A module is about to write a state."""


class _Stopping:
    """A cache that is read from, and stops what writes into it."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        if name in UPDATES:
            raise _Stopped
        return getattr(self.cache, name)


__all__ = ["RecurrentStates"]
