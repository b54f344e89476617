"""Counts the operations, kernels, uploads and host waits of a decoding step, by the parts of the step."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .methods import measure
from .step_parts import wrapped_parts


KINDS = ("operations", "kernels", "uploads", "waits")
# The counter's names of the parts in `wrapped_parts`. Everything else is bookkeeping.
PHASES = {
    "draft": "draft",
    "drafter_layer": "draft",
    "draft_head": "draft",
    "tree": "tree",
    "verify": "masks",
    "target_forward": "target_forward",
    "acceptance": "acceptance",
    "compaction": "compaction",
}
# Composite on a CPU, a single kernel on a GPU.
_WHOLE = {"aten::rms_norm"}
_NO_KERNEL = {
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::_local_scalar_dense",
}
# Their result, or its shape, is only known after the device has computed it.
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}


class OperationCounter(TorchDispatchMode):
    """Counts dispatched operations by phase while it is active.

    Operations are counted when they are dispatched. Kernels are counted below them, without views and allocations; a GPU
    launches each kernel. On a CPU, every read by the host counts as a wait, and every tensor made from Python values as an
    upload, as if the tensors were on a GPU.

    Args:
        drafts (`bool`): whether steps begin with the first draft; else they begin at the end of the first forward pass.
    """

    def __init__(self, drafts: bool = False):
        super().__init__()
        self.drafts = drafts
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.phases = ["prefill"]
        self.forwards = 0
        self._depth = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context in which everything is counted."""
        with _Reads(self), self:
            yield

    def add(self, kind: str) -> None:
        """Counts one in the current phase. The prefill is not counted."""
        self.counts[self.phases[-1]][kind] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context in which counts belong to this phase."""
        self.phases.append("prefill" if self.phases[0] == "prefill" else name)
        try:
            yield
        finally:
            self.phases.pop()

    def wrap(self, function: Callable, part: str) -> Callable:
        """Wraps a part's function, for [`wrapped_parts`]."""

        @wraps(function)  # generation reads the forward's signature
        def run(*args, **kwargs):
            if part == "draft":
                self.phases[0] = "bookkeeping"
            with self.phase(PHASES[part]):
                result = function(*args, **kwargs)
            if part == "target_forward":
                self.forwards += 1
                if not self.drafts:
                    self.phases[0] = "bookkeeping"
            return result

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if not self._depth:
            self.add("operations")
        self._depth += 1
        try:
            if name not in _WHOLE:
                with self:  # inference mode dispatches composite operations whole
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if not func.is_view and name not in _NO_KERNEL:
                self.add("kernels")
            for kind in _transfers(name, args):
                self.add(kind)
            return func(*args, **kwargs)
        finally:
            self._depth -= 1


class _Reads(TorchFunctionMode):
    """Counts reads by the host for which a CPU dispatches nothing."""

    def __init__(self, counter: OperationCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and args[0].device.type == "cpu":
            self.counter.add("waits")
        return func(*args, **(kwargs or {}))


def _transfers(name: str, args: Sequence[Any]) -> Iterator[str]:
    """Yields "uploads" or "waits" for an operation that uploads or makes the host wait."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if name == "aten::lift_fresh":
        yield "uploads"
    elif name in ("aten::_to_copy", "aten::copy_"):
        # without a GPU both sides are on the CPU
        on_cpu = [value.device.type == "cpu" for value in tensors]
        if name == "aten::copy_" and len(set(on_cpu)) == 2:
            yield "waits" if on_cpu[0] else "uploads"
    elif name in _WAITS:
        yield "waits"
    elif name == "aten::index":
        yield from ("waits" for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8))


def count_step(
    target: Any, drafter: Any, prompts: Sequence[torch.Tensor], max_new_tokens: int, **settings: Any
) -> dict[str, Any]:
    """Generates, and counts from the end of the prefill on.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`], *optional*): None for plain decoding or prompt lookup.
        prompts (`list[torch.LongTensor]`): ids `[1, L]` of at least one prompt.
        max_new_tokens (`int`): tokens per prompt.
        **settings: fields of the generation config.

    Returns:
        `dict`: `steps`, `tokens_per_step`, and, per step, the counts of all `phases` and their sum `outside` of the target's
        forward pass.
    """
    measure(target, prompts[0], 8, drafter, **settings)  # warm-up: some things are made once per pair
    pooled: dict[str, Counter] = defaultdict(Counter)
    steps = tokens = 0
    for ids in prompts:
        counter = OperationCounter(drafter is not None)
        with wrapped_parts(target, drafter, counter.wrap), counter.counting():
            tokens += len(measure(target, ids, max_new_tokens, drafter, **settings).new_ids) - 1
        steps += counter.forwards - 1
        for phase, counts in counter.counts.items():
            pooled[phase].update(counts)
    return counts_per_step(pooled, steps, tokens)


def counts_per_step(pooled: dict[str, Counter], steps: int, tokens: int) -> dict[str, Any]:
    """What was counted in `steps` steps, by phase, as a step's counts; see [`count_step`].

    Args:
        pooled (`dict[str, Counter]`): counts of [`OperationCounter`] by phase, of one answer or several.
        steps (`int`), tokens (`int`): of those answers, without their prefills.
    """
    phases = {
        phase: {kind: round(pooled[phase][kind] / max(steps, 1), 2) for kind in KINDS}
        for phase in (*dict.fromkeys(PHASES.values()), "bookkeeping")
        if phase in pooled
    }
    outside = {
        kind: round(sum(counts[kind] for phase, counts in phases.items() if phase != "target_forward"), 2)
        for kind in KINDS
    }
    return {"steps": steps, "tokens_per_step": round(tokens / max(steps, 1), 3), "phases": phases, "outside": outside}


__all__ = ["KINDS", "PHASES", "OperationCounter", "count_step", "counts_per_step"]
