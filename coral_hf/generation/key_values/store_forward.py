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
    """Runs the target on a store of its own.

    Args:
        target (`PreTrainedModel`): one that `paths.target_obstacle` finds nothing in.
        capacity (`int`): rows.
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
        """One forward over the nodes `[n, N]` of every live row, after what the row contains.

        Args:
            tree ([`DraftTree`])
            offsets (`list[int]`, *optional*): of each row, what to add to a place for its position.
            most (`int`, *optional*): no text gets longer: nodes that lie deeper are never accepted, but take positions.
            kwargs: for the target's forward.
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
        """Masks by window -> as the target takes them: one, or by the kind of layer if there are several."""
        found = {window: as_added(mask.to(self.device), self.target) for window, mask in masks.items()}
        kinds = {kind: found[window] for kind, window in self.kinds.items()}
        return kinds if len(kinds) > 1 else next(iter(kinds.values()))


def as_added(mask: torch.Tensor, target: PreTrainedModel) -> torch.Tensor:
    """A bool mask as the target's attention takes it: what is added to the scores.

    `eager` takes nothing else: a bool mask would be silently wrong. On a CPU sdpa makes this of it, in every layer.
    """
    dtype = target.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


__all__ = ["StoreForward", "as_added"]
