"""Draft trees in the target's dynamic KV cache: masks before the verification pass, compaction after it."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..draft_tree import DraftTree
from .recurrent_layers import LINEAR_TYPES, crop, is_linear


# Layer types, as configs name them, that take a tree mask or need none.
_TYPES_OF_TREES = {"full_attention", "sliding_attention", "moe", "mlp"} | LINEAR_TYPES


def check_cache(
    cache: Cache, branches: bool, layer_types: Sequence[str] = (), own_layers: Collection[type] = ()
) -> None:
    """Raises `ValueError` for a cache from which rejected drafts cannot be dropped, or that does not support trees.

    Caches that cannot drop drafts come first. Otherwise the remedy for trees, chains, could lead to the next refusal.

    Args:
        cache (`Cache`)
        branches (`bool`): drafts are trees. A chain only needs a cache that can be cropped.
        layer_types (`Sequence[str]`): layer types of the target.
        own_layers (`Collection[type]`): cache layers of the target's default cache.
    """
    # cache layers without states belong to layers that read another layer's keys, such as Gemma 4's last layers
    layers = [layer for layer in cache.layers if type(layer).__name__ != "DummyLayer"]
    for layer in layers:
        kind = type(layer).__name__
        if _drops_drafts(layer):
            continue
        if is_linear(layer) or type(layer) in own_layers:
            raise ValueError(
                f"In this Transformers release, {kind}, which contains this target's states, cannot drop rejected drafts. "
                "Generate without assistant_model, or install a newer Transformers."
            )
        raise ValueError(
            f"CORAL verifies drafts in a dynamic cache, not in {kind}. Remove cache_implementation (or pass a "
            "DynamicCache)."
        )
    if not branches:
        return
    unknown = sorted(set(layer_types) - _TYPES_OF_TREES)
    if unknown:
        raise ValueError(
            f"This target has layers of type {unknown}, for which no tree mask is known. Set draft_top_k=1 to verify "
            "chains."
        )
    for layer in layers:
        kind = type(layer).__name__
        if _has_index(layer):
            raise ValueError(
                f"This target has layers whose index cannot branch ({kind}). Set draft_top_k=1 to verify chains."
            )


def _has_index(layer: Any) -> bool:
    """Whether a layer also keeps an index, which selects the keys to attend to (DeepSeek-V3.2, GLM-5)."""
    return "Indexed" in type(layer).__name__ or hasattr(layer, "indexer_keys")


def _drops_drafts(layer: Any) -> bool:
    """Whether the last tokens of a cache layer can be removed, with all of their states."""
    kind = type(layer)
    if is_linear(layer):
        return hasattr(layer, "activate_past_recording")
    if not isinstance(layer, DynamicLayer) or "Quantized" in kind.__name__:
        return False
    # a plain layer's `crop` does not crop an index
    return not _has_index(layer) or kind.crop is not DynamicLayer.crop


def tree_attention_mask(
    tree: DraftTree,
    prefix_length: int | torch.Tensor,
    key_length: int,
    key_offset: int,
    sliding_window: int | None = None,
    prefix_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention mask of each tree node in one layer of the target.

    Args:
        tree ([`DraftTree`]): N nodes, which follow the prefix in the cache.
        prefix_length (`int`, or `torch.LongTensor` of shape `[B]`): tokens before the root, for all rows or for each.
        key_length (`int`), key_offset (`int`): number of the layer's keys and token of the first key, as returned by
            `cache.layers[i].get_mask_sizes(N)`.
        sliding_window (`int`, *optional*): window of the layer. Distances are counted in tree depth, not in slots.
        prefix_mask (`torch.BoolTensor` of shape `[1, prefix_length]`, *optional*): False at padding. Only with an `int` for
            `prefix_length`.

    Returns:
        `torch.BoolTensor` of shape `[B, 1, N, key_length]`, True where visible.
    """
    batch, nodes = tree.tokens.shape
    device = tree.tokens.device
    if isinstance(prefix_length, torch.Tensor):
        return _ragged_mask(tree, prefix_length, key_length, key_offset, sliding_window)
    position = prefix_length + tree.depths  # [B, N], in slots of the prefix
    prefix = torch.arange(key_offset, key_offset + key_length - nodes, device=device)  # [P]
    visible = torch.ones(batch, nodes, prefix.numel(), dtype=torch.bool, device=device)
    if prefix_mask is not None:
        visible = visible & prefix_mask[:, None, key_offset : key_offset + prefix.numel()].to(device)
    among = tree.ancestors
    if sliding_window is not None:
        visible = visible & (position[..., None] - prefix < sliding_window)
        among = among & (tree.depths[..., None] - tree.depths[:, None] < sliding_window)
    return torch.cat([visible, among], dim=-1)[:, None]


def _ragged_mask(tree: DraftTree, lengths: torch.Tensor, keys: int, offset: int, window: int | None) -> torch.Tensor:
    """[`tree_attention_mask`] for rows of different lengths `[B]`."""
    nodes, device = tree.num_nodes, tree.tokens.device
    place = torch.arange(offset, offset + keys, device=device) - lengths.to(device)[:, None]  # [B, keys], 0: the root
    node = place.clamp(0, nodes - 1)
    in_tree = (place >= 0) & (place < nodes)
    among = tree.ancestors.gather(2, node[:, None].expand(-1, nodes, -1)) & in_tree[:, None]  # [B, N, keys]
    visible = (place < 0)[:, None] | among
    if window is not None:
        depth = torch.where(in_tree, tree.depths.gather(1, node), place)  # depth of each key; the root's is 0
        visible = visible & (tree.depths[..., None] - depth[:, None] < window)
    return visible[:, None]


def compact_cache(cache: Cache, path: Sequence[int], num_nodes: int) -> None:
    """Keeps the accepted nodes' keys and values and drops the other drafts. Recurrent states stay unchanged.

    Args:
        cache (`Cache`): a dynamic cache that records its past (`activate_past_recording`) and ends with the N nodes.
        path (`Sequence[int]`): accepted nodes, root first, in cache order.
        num_nodes (`int`): number of nodes N.
    """
    kept = len(path)
    # A path 0, 1, 2, ... (a chain, or the best branch) is already at the front.
    if kept < num_nodes and list(path) != list(range(kept)):
        rows: dict[torch.device, torch.Tensor] = {}  # indices, copied once per device
        for layer in cache.layers:
            if not getattr(layer, "is_initialized", False) or layer.keys is None:
                continue
            for states in (layer.keys, layer.values):
                start = states.shape[-2] - num_nodes
                if states.device not in rows:
                    rows[states.device] = torch.tensor(path, device=states.device)
                accepted = states.index_select(-2, start + rows[states.device])
                states[..., start : start + kept, :] = accepted
    # Also if nothing is dropped, because sliding layers shrink back to their window here. `cache.crop` of Transformers 5.17
    # fails for layers that share another layer's keys.
    for layer in cache.layers:
        if getattr(layer, "is_initialized", True):
            crop(layer, num_nodes - kept)


def empty_layer(layer: DynamicLayer) -> None:
    """Frees a layer's states, so that it can be filled again."""
    layer.keys = layer.values = None
    layer.is_initialized = False
    if layer.is_sliding:
        layer.cumulative_length = 0
        layer.record_past = False


__all__ = ["check_cache", "compact_cache", "empty_layer", "tree_attention_mask"]
