"""The target's forward pass over trees of a few fixed sizes. Each size has a graph; all share one static store."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...drafter.output_hooks import leave_out_of_copies
from ...utils.compat import cache_kwarg
from ..attention.verifying import verifying
from ..draft_tree import DraftTree
from ..key_values.dynamic import tree_attention_mask
from ..key_values.paths import layer_windows
from ..key_values.store_forward import StoreForward
from .graphs import compiled
from .plan import GraphPlan, padded_count
from .static_store import StaticStore


@dataclass
class _Graphs:
    """State that is kept between calls: a graph for each number of nodes, and the store that the graphs address."""

    store: StaticStore
    by_nodes: dict[int, Callable[..., Any]]


class StaticForward(StoreForward):
    """A compiled [`StoreForward`]: the same forward passes over the same texts, in shapes that never change.

    Args:
        target (`PreTrainedModel`): a target without a `paths.target_obstacle`.
        capacity (`int`): rows, B.
        plan ([`GraphPlan`])
        hidden_states (`list[int]` or `bool`): the layers whose hidden states each forward pass keeps; True: all.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        capacity: int,
        plan: GraphPlan,
        hidden_states: list[int] | bool,
    ):
        super().__init__(target, capacity, rolling=False)
        self.options, self.hidden_states = plan.options, hidden_states
        leave_out_of_copies(target)  # before compilation, because a change of hooks causes a recompilation
        asked = tuple(hidden_states) if isinstance(hidden_states, list) else hidden_states
        key = ("verify", capacity, plan.length, str(plan.options), asked, target.dtype, self.device)
        windows = layer_windows(target)
        self._graphs = plan.take(target, key, target, lambda: _Graphs(StaticStore(windows, capacity, plan.length), {}))
        self.store: StaticStore = self._graphs.store

    def run(self, tree: DraftTree, offsets: list[int] | None = None, most: int | None = None, **kwargs: Any) -> Any:
        """As [`StoreForward.run`]. Returns a namespace of `logits` `[n, N, V]` and `hidden_states`."""
        store, nodes, live = self.store, tree.num_nodes, tree.tokens.shape[0]
        count = padded_count(nodes)
        store.begin(count)
        device, ended = self.device, store.capacity - live
        extra = count - nodes
        ids = F.pad(tree.tokens.to(device), (0, extra, 0, ended))
        depths = F.pad(tree.depths.to(device), (0, extra, 0, ended))
        ancestors = F.pad(tree.ancestors.to(device), (0, extra, 0, extra, 0, ended))
        # a padding node sees itself, which avoids NaN
        ancestors = ancestors | torch.eye(count, dtype=torch.bool, device=device)
        moved = [*(offsets or []), *[0] * (store.capacity - len(offsets or []))]
        shift = torch.tensor(moved, device=device)
        limit = store.length if most is None else most
        if count not in self._graphs.by_nodes:
            self._graphs.by_nodes[count] = compiled(_forward, self.options)
        graph = self._graphs.by_nodes[count]
        last = torch.full((), limit - 1, device=device)
        inputs = (ids, depths, ancestors, store.starts, shift, last)
        if self.replaces_attention:
            with verifying(self.target, store.whole()):
                logits, states = graph(self.target, store, self.kinds, self.hidden_states, *inputs)
        else:
            logits, states = graph(self.target, store, self.kinds, self.hidden_states, *inputs)
        states = tuple(None if state is None else state[:live, :nodes] for state in states)
        return SimpleNamespace(logits=logits[:live, :nodes], hidden_states=states)


def _forward(
    target: Any,
    store: StaticStore,
    kinds: dict[str, int | None],
    hidden_states: list[int] | bool,
    ids: torch.Tensor,
    depths: torch.Tensor,
    ancestors: torch.Tensor,
    starts: torch.Tensor,
    shift: torch.Tensor,
    last: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The compiled function: masks, positions and the target's forward pass over `[B, N]` nodes."""
    tree = DraftTree(ids, depths, depths, depths, ancestors)
    positions = torch.minimum(starts[:, None] + depths, last) + shift[:, None]
    dtype = target.dtype
    masks = {}
    for window in set(kinds.values()):
        visible = tree_attention_mask(tree, starts, store.length, 0, window)
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        masks[window] = zeros.masked_fill(~visible, torch.finfo(dtype).min)
    by_kind = {kind: masks[window] for kind, window in kinds.items()}
    outputs = target(
        input_ids=ids,
        position_ids=positions,
        attention_mask=by_kind if len(by_kind) > 1 else next(iter(by_kind.values())),
        use_cache=True,
        return_dict=True,
        output_hidden_states=hidden_states,
        **cache_kwarg(store),
    )
    return outputs.logits, outputs.hidden_states


__all__ = ["StaticForward"]
