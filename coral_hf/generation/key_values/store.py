"""One preallocated key-value store with a length per row: batched generation, regeneration and single sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..draft_tree import DraftTree
from .dynamic import empty_layer, tree_attention_mask


# The store grows in steps of this many places, because most texts never reach their maximum length.
BLOCK = 128


class _Kind:
    """The layers with one window: a buffer for each shape, and the first place in the buffers."""

    def __init__(self, window: int | None):
        self.window = window
        self.base = 0
        # each [entries, rows, heads, places, d]; an entry is a layer's keys or values
        self.buffers: list[Any] = []
        # for each buffer, by entry: the views that the next forward pass writes and reads, if all rows have the same length
        self.written: list[tuple[torch.Tensor, ...]] = []
        self.held: list[tuple[torch.Tensor, ...]] = []

    def view(self, rows: int, start: int, end: int) -> None:
        """Makes the views of all layers at once. Places `start` to `end` are written, and everything up to `end` is read."""
        live = [buffer[:, :rows] for buffer in self.buffers]
        self.written = [buffer[..., start - self.base : end - self.base, :].unbind(0) for buffer in live]
        self.held = [buffer[..., : end - self.base, :].unbind(0) for buffer in live]


class StoreLayer(CacheLayerMixin):
    """One layer's view of the store. The store decides where a forward pass writes."""

    is_sliding = False

    def __init__(self, store: "KeyValueStore", kind: _Kind):
        super().__init__()
        self.store, self.kind = store, kind
        self.entries: list[tuple[int, int]] = []  # (buffer, entry) of the keys and of the values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: [`KeyValueStore.load`] fills the buffers before the first forward pass."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return self._write(0, key_states), self._write(1, value_states)

    def _write(self, side: int, states: torch.Tensor) -> torch.Tensor:
        """Writes `[n, heads, T, d]` after each row's end. Returns the whole rows, `[n, heads, places, d]`."""
        store, base = self.store, self.kind.base
        buffer, entry = self.entries[side]
        if store.places is None:
            self.kind.written[buffer][entry].copy_(states)
            return self.kind.held[buffer][entry]
        held = self.kind.buffers[buffer][entry]
        held[store.row_index, :, store.places - base] = states.transpose(1, 2)  # [n, T, heads, d]
        return held[: store.num_rows, :, : store.end - base]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.end - self.kind.base, self.kind.base

    def get_seq_length(self) -> int:
        return self.store.end

    def get_max_length(self) -> int:
        return -1


class KeyValueStore(Cache):
    """Keys and values of `capacity` rows of different lengths. The first `num_rows` of them are live.

    Place p of a row contains its p-th token, not counting padding. A forward pass over T tokens per row writes them after each
    row's end, in three calls: [`begin`], the forward pass, [`keep`]. `keep` moves the accepted nodes of a draft tree to the front,
    with one gather and one scatter for all rows and all layers of a shape.

    Args:
        windows (`list` of `int` or `None`): the sliding window of each layer, None for full attention.
        capacity (`int`): number of rows.
        rolling (`bool`): no new rows begin later, so that sliding layers may drop tokens that no window reaches.
    """

    layer_class = StoreLayer

    def __init__(self, windows: Sequence[int | None], capacity: int, rolling: bool = True):
        self.capacity, self.rolling = capacity, rolling
        self.lengths = [0] * capacity
        self.num_rows = capacity
        self.kinds = {window: _Kind(window) for window in dict.fromkeys(windows)}
        self.places: torch.Tensor | None = None  # [n, T] places to write; None: the same slice of every row
        self.row_index: Any = None
        self.end = 0  # places of the longest row, including those to write
        super().__init__(layers=[self.layer_class(self, self.kinds[window]) for window in windows])

    # Filling ---------------------------------------------------------------------------------------------------

    def load(self, cache: Cache, rows: Sequence[int], first: Sequence[int], lengths: Sequence[int]) -> None:
        """Moves prefilled prompts into rows. The cache is empty afterwards.

        Args:
            cache (`Cache`): a dynamic cache of `len(rows)` rows. Sliding layers may have dropped tokens out of reach.
            rows (`Sequence[int]`): the destination of each row of the batch.
            first (`Sequence[int]`): the column of each row's first token, after its padding.
            lengths (`Sequence[int]`): tokens of each row.
        """
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        total = cache.get_seq_length()
        if self.rolling:
            for kind in self.kinds.values():
                kind.base = 0 if kind.window is None else max(min(lengths) - kind.window + 1, 0)
        # cleared layer by layer while filling, because the whole store and the whole cache together would need twice the memory
        whole = not self.layers[0].entries and len(rows) == self.capacity
        self._make_buffers(cache.layers)
        self._reserve(max(lengths), cleared=not whole)
        device = cache.layers[0].keys.device
        index = torch.tensor(rows, device=device)
        starts = torch.tensor(first, device=device)
        for layer, source in zip(self.layers, cache.layers, strict=True):
            base = layer.kind.base
            width = max(lengths) - base
            dropped = total - source.keys.shape[2]  # columns that a sliding layer no longer has
            columns = starts[:, None] + torch.arange(base, base + width, device=device) - dropped  # [b, width]
            columns = columns.clamp(0, total - dropped - 1)
            for (buffer, entry), states in zip(layer.entries, (source.keys, source.values), strict=True):
                places = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                held = layer.kind.buffers[buffer][entry]
                held[index, :, :width] = states.gather(2, places)
                if whole:
                    held[:, :, width:] = 0
            empty_layer(source)  # layer by layer, so that there are never two copies of everything

    def _make_buffers(self, layers: Sequence[Any]) -> None:
        """Empty buffers for the keys and values of a dynamic cache: one for each shape of each kind of layer."""
        if self.layers[0].entries:
            return
        counts: dict[tuple, int] = {}  # entries of each shape, in the order of the buffers
        for layer, source in zip(self.layers, layers, strict=True):
            for states in (source.keys, source.values):
                shape = (layer.kind.window, states.shape[1], states.shape[3])
                entry = counts.get(shape, 0)
                counts[shape] = entry + 1
                layer.entries.append(
                    ([shape for shape in counts if shape[0] == layer.kind.window].index(shape), entry)
                )
        for (window, heads, dim), count in counts.items():
            self.kinds[window].buffers.append(self._buffer(count, heads, dim, layers[0].keys))

    def _buffer(self, count: int, heads: int, dim: int, like: torch.Tensor) -> Any:
        """An empty buffer for the keys and values of `count` entries."""
        return like.new_zeros(count, self.capacity, heads, 0, dim)

    def _reserve(self, end: int, cleared: bool = True) -> None:
        """Makes room for rows of `end` tokens: `cleared`, unless the caller writes all of it."""
        for kind in self.kinds.values():
            if not kind.buffers or kind.buffers[0].shape[3] >= end - kind.base:
                continue
            held = kind.buffers[0].shape[3]
            drop = 0
            if self.rolling and kind.window is not None and held:
                drop = max(min(self.lengths[: self.num_rows]) - kind.window + 1 - kind.base, 0)
                drop = drop if drop >= BLOCK else 0
            size = max(-(-(end - kind.base - drop) // BLOCK) * BLOCK, held)
            for index, buffer in enumerate(kind.buffers):
                # Zeros, not empty: a masked NaN is still a NaN after the product with its zero weight.
                shape = (*buffer.shape[:3], size, buffer.shape[4])
                grown = buffer.new_zeros(shape) if cleared else buffer.new_empty(shape)
                grown[..., : held - drop, :] = buffer[..., drop:, :]
                kind.buffers[index] = grown
            kind.base += drop

    # Stepping --------------------------------------------------------------------------------------------------

    def begin(self, count: int) -> None:
        """Makes room for `count` tokens after the end of every live row, for the next forward pass."""
        lengths = self.lengths[: self.num_rows]
        self.end = max(lengths) + count
        self._reserve(self.end)
        self.places = self.row_index = None
        if min(lengths) != max(lengths):
            device = self.layers[0].kind.buffers[0].device
            rows = torch.tensor([list(range(self.num_rows)), lengths], device=device)
            self.row_index = rows[0, :, None]
            self.places = rows[1, :, None] + torch.arange(count, device=device)
            return
        for kind in self.kinds.values():
            kind.view(self.num_rows, lengths[0], self.end)

    def masks(self, tree: DraftTree) -> dict[int | None, torch.Tensor]:
        """The attention masks of all nodes after [`begin`]: `[n, 1, N, places]` for every window."""
        prefix: int | torch.Tensor = self.lengths[0] if self.places is None else self.places[:, 0]
        return {
            window: tree_attention_mask(tree, prefix, self.end - kind.base, kind.base, window)
            for window, kind in self.kinds.items()
        }

    def whole(self) -> list[bool]:
        """For each layer, after [`begin`]: whether all nodes of each row see the whole prefix."""
        if self.places is not None:
            return [False] * len(self.layers)
        sees = {
            window: window is None or self.end - kind.base <= window  # if all nodes are a chain
            for window, kind in self.kinds.items()
        }
        return [sees[layer.kind.window] for layer in self.layers]

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps each row's accepted nodes of the last forward pass, root first. The rest is overwritten later.

        Args:
            paths (`Sequence[Sequence[int]]`): each live row's accepted nodes, in ascending order.
        """
        moves = [
            (row, self.lengths[row] + node, self.lengths[row] + place)
            for row, path in enumerate(paths)
            for place, node in enumerate(path)
            if node != place  # a chain, or the best branch, is already at the front
        ]
        if moves:
            self._move(moves)
        for row, path in enumerate(paths):
            self.lengths[row] += len(path)
        self.end = max(self.lengths[: self.num_rows], default=0)

    def _move(self, moves: list[tuple[int, int, int]]) -> None:
        for kind in self.kinds.values():
            for buffer in kind.buffers:
                rows, sources, places = torch.tensor(moves, device=buffer.device).T
                buffer[:, rows, :, places - kind.base] = buffer[:, rows, :, sources - kind.base]

    def keep_rows(self, order: Sequence[int]) -> None:
        """Keeps these live rows, in this order. A row that moves takes the place of a removed one."""
        for row, source in enumerate(order):
            if row != source:
                self.move_row(source, row)
        self.num_rows = len(order)
        self.end = max(self.lengths[: self.num_rows], default=0)

    def move_row(self, source: int, destination: int) -> None:
        """Copies one row to another."""
        length = self.lengths[destination] = self.lengths[source]
        for kind in self.kinds.values():
            for buffer in kind.buffers:
                width = length - kind.base
                buffer[:, destination, :, :width] = buffer[:, source, :, :width]

    def copy_to(self, cache: Cache) -> None:
        """Fills an emptied dynamic cache with the only row."""
        (length,) = self.lengths[: self.num_rows]
        for layer, destination in zip(self.layers, cache.layers, strict=True):
            base = layer.kind.base
            states = [
                layer.kind.buffers[buffer][entry][:1, :, : length - base].clone() for buffer, entry in layer.entries
            ]
            destination.update(*states)
            if base:  # the layer counts only the tokens that it received
                destination.cumulative_length = length


__all__ = ["BLOCK", "KeyValueStore", "StoreLayer"]
