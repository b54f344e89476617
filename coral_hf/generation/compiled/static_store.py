"""The key-value store in buffers of fixed length, which compiled forward passes write at indices given by a tensor."""

from collections.abc import Sequence
from typing import Any

import torch

from ..key_values.store import KeyValueStore, StoreLayer


class _StaticLayer(StoreLayer):
    """A layer that reads and writes the same tensors at every step, for rows of any length."""

    is_compileable = True

    def _write(self, side: int, states: torch.Tensor) -> torch.Tensor:
        """Writes `[B, heads, T, d]` at the store's `places` and returns the whole buffer, `[B, heads, length, d]`."""
        buffer, entry = self.entries[side]
        held = self.kind.buffers[buffer][entry]
        places: Any = self.store.places  # [B, T]
        if len(states) == 1:
            held.index_copy_(2, places[0], states)
        else:
            held[self.store.row_index, :, places] = states.transpose(1, 2)  # [B, T, heads, d]
        return held


class StaticStore(KeyValueStore):
    """A [`KeyValueStore`] that never grows. Every layer has its own tensor at a fixed address.

    All rows take part in every forward pass. A row that has ended is treated as a row without a prefix.

    Args:
        windows (`list` of `int` or `None`): the sliding window of each layer.
        capacity (`int`): number of rows, B.
        length (`int`): slots per row: enough for the longest text and the nodes of one forward pass.
    """

    layer_class = _StaticLayer

    def __init__(self, windows: Sequence[int | None], capacity: int, length: int):
        super().__init__(windows, capacity, rolling=False)
        self.length = self.end = length
        self.starts = torch.zeros(0)

    def load(self, cache: Any, rows: Sequence[int], first: Sequence[int], lengths: Sequence[int]) -> None:
        self.num_rows = self.capacity
        for kind in self.kinds.values():
            for buffers in kind.buffers:
                for buffer in buffers:
                    buffer.zero_()  # a NaN left by an earlier call would pass through the mask
        super().load(cache, rows, first, lengths)

    def _buffer(self, count: int, heads: int, dim: int, like: torch.Tensor) -> Any:
        made = [like.new_zeros(self.capacity, heads, self.length, dim) for _ in range(count)]
        for tensor in made:
            # otherwise a CUDA graph would get copies
            torch._dynamo.mark_static_address(tensor)
        return made

    def _reserve(self, end: int, cleared: bool = True) -> None:
        """Does nothing, because the store never grows."""

    def begin(self, count: int) -> None:
        """Sets where the next forward pass writes `count` tokens per row: after a live row's end, or at 0 for an ended row."""
        lengths = [length if row < self.num_rows else 0 for row, length in enumerate(self.lengths)]
        device = self.layers[0].kind.buffers[0][0].device
        self.starts = torch.tensor(lengths, device=device)
        self.places = self.starts[:, None] + torch.arange(count, device=device)
        if self.capacity > 1 and self.row_index is None:
            self.row_index = torch.arange(self.capacity, device=device)[:, None]

    def whole(self) -> list[bool]:
        return [False] * len(self.layers)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        super().keep(paths)
        self.end = self.length

    def keep_rows(self, order: Sequence[int]) -> None:
        super().keep_rows(order)
        self.end = self.length

    def _move(self, moves: list[tuple[int, int, int]]) -> None:
        rows, sources, places = torch.tensor(moves, device=self.layers[0].kind.buffers[0][0].device).T
        for kind in self.kinds.values():
            for buffers in kind.buffers:
                for buffer in buffers:
                    buffer[rows, :, places] = buffer[rows, :, sources]

    def move_row(self, source: int, destination: int) -> None:
        length = self.lengths[destination] = self.lengths[source]
        for kind in self.kinds.values():
            for buffers in kind.buffers:
                for buffer in buffers:
                    buffer[destination, :, :length] = buffer[source, :, :length]


__all__ = ["StaticStore"]
