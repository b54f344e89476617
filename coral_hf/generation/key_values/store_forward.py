"""Forward passes of the target over the key-value store: the draft trees of all live rows at once."""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from ...utils.compat import cache_kwarg
from ..attention.verifying import replaces_attention, verifying
from ..draft_tree import DraftTree
from .paths import layer_kinds, layer_windows
from .store import KeyValueStore


class StoreForward:
    """Runs the target on its own store.

    Args:
        target (`PreTrainedModel`): a target without a `paths.target_obstacle`.
        capacity (`int`): number of rows.
        rolling (`bool`): see [`KeyValueStore`].
    """

    def __init__(self, target: PreTrainedModel, capacity: int, rolling: bool = True):
        self.target = target
        windows = layer_windows(target)
        self.kinds = dict(zip(layer_kinds(target), windows, strict=True))
        self.store = KeyValueStore(windows, capacity, rolling)
        self.device = target.get_input_embeddings().weight.device
        self.replaces_attention = replaces_attention(target)

    def run(self, tree: DraftTree, offsets: list[int] | None = None, most: int | None = None, **kwargs: Any) -> Any:
        """One forward pass over the nodes `[n, N]` of every live row, after the row's tokens.

        Args:
            tree ([`DraftTree`])
            offsets (`list[int]`, *optional*): for each row, the difference between position and place.
            most (`int`, *optional*): the longest text. Deeper nodes are never accepted, but need valid positions.
            kwargs: passed to the target's forward.
        """
        store = self.store
        store.begin(tree.num_nodes)
        starts = [store.lengths[row] + (offsets[row] if offsets else 0) for row in range(store.num_rows)]
        if len(set(starts)) == 1:
            positions = tree.depths.to(self.device) + starts[0]
        else:
            positions = tree.depths.to(self.device) + torch.tensor(starts, device=self.device)[:, None]
        with verifying(self.target, store.whole()) if self.replaces_attention else nullcontext():
            return self.target(
                input_ids=tree.tokens.to(self.device),
                position_ids=positions if most is None else positions.clamp(max=most - 1 + max(offsets or [0])),
                attention_mask=self.by_kind(store.masks(tree)),
                use_cache=True,
                return_dict=True,
                **cache_kwarg(store),
                **kwargs,
            )

    def by_kind(self, masks: dict[int | None, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks by window -> in the target's format: a single mask, or one per layer type if there are several."""
        found = {window: as_added(mask.to(self.device), self.target) for window, mask in masks.items()}
        kinds = {kind: found[window] for kind, window in self.kinds.items()}
        return kinds if len(kinds) > 1 else next(iter(kinds.values()))


def as_added(mask: torch.Tensor, target: PreTrainedModel) -> torch.Tensor:
    """Converts a bool mask to the additive mask that the target's attention takes.

    `eager` only takes additive masks: a bool mask would be silently wrong. On a CPU, sdpa would convert it in every layer.
    """
    dtype = target.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


__all__ = ["StoreForward", "as_added"]
