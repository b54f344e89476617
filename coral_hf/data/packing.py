"""Packs several conversations into one row, so that batches need little padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

from .dataset import ConversationDataset


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: takes conversations from the longest on, each into the fullest row with room for it.

    Args:
        lengths (`Sequence[int]`): lengths of the conversations, each at most `max_length`.
        max_length (`int`): length of a row.

    Returns:
        `list[list[int]]`: indices of the conversations in each row. They depend only on the arguments.

    Raises:
        ValueError: if a conversation is longer than a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > max_length:
            raise ValueError(
                f"a conversation of {length} tokens does not fit into a row of {max_length}; cut it there."
            )
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, row = max_length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        if room > length:
            insort(rooms, (room - length, row))
    return rows


def join(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Concatenates conversations: `input_ids` `[S]`, `response_mask` `[S]` and their `lengths`."""
    joined = {name: torch.cat([item[name] for item in items]) for name in ("input_ids", "response_mask")}
    return {**joined, "lengths": [len(item["input_ids"]) for item in items]}


class PackedConversations(torch.utils.data.Dataset):
    """Rows of up to `max_length` tokens, each of several whole conversations (see [`join`]).

    The contents of a row depend only on the data, and the order of rows on seed and epoch. A resumed training therefore sees
    the same batches.

    Args:
        dataset ([`ConversationDataset`])
        max_length (`int`): most tokens of a row. Rows are shorter if all conversations together are.

    Raises:
        ValueError: if a conversation is longer than a row.
    """

    def __init__(self, dataset: ConversationDataset, max_length: int):
        self.dataset = dataset
        self.rows = pack_lengths([len(ids) for ids, _ in dataset.conversations], max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return join([self.dataset[place] for place in self.rows[index]])

    @property
    def num_response_tokens(self) -> int:
        return self.dataset.num_response_tokens

    def response_counts(self, vocab_size: int) -> torch.Tensor:
        """As [`ConversationDataset.response_counts`]."""
        return self.dataset.response_counts(vocab_size)


__all__ = ["PackedConversations", "join", "pack_lengths"]
