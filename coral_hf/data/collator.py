"""Encoded conversations -> batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


IGNORED_LABEL = -100


@dataclass
class CoralDataCollator:
    """Pads rows of one or several conversations on the right.

    Returns a dict of `input_ids` `[B, S]`, `document_ids` `[B, S]` (a row's conversations count from 0, padding is -1),
    `labels` `[B, S]` (the id where it is a trainable response token, else -100; `Trainer` counts them to scale
    accumulated losses); for packed rows (items with `lengths`, see [`PackedConversations`]) `position_ids` `[B, S]`,
    which restart at each conversation; and, with a feature cache that contains all conversations, `features`
    `[B, S, n * H]`.
    """

    pad_token_id: int = 0
    feature_cache: Any = field(default=None, repr=False)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(item["input_ids"], dtype=torch.long) for item in items]
        masks = [torch.as_tensor(item["response_mask"], dtype=torch.bool) for item in items]
        lengths = [list(item.get("lengths", [len(row)])) for item, row in zip(items, ids, strict=True)]
        length = max(len(row) for row in ids)
        shape = (len(items), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "document_ids": torch.full(shape, -1),
            "labels": torch.full(shape, IGNORED_LABEL),
        }
        for index, (row, mask, parts) in enumerate(zip(ids, masks, lengths, strict=True)):
            batch["input_ids"][index, : len(row)] = row
            batch["labels"][index, : len(row)] = row.masked_fill(~mask, IGNORED_LABEL)
            documents = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
            batch["document_ids"][index, : len(row)] = documents
            for start in _starts(parts):
                # no drafter row predicts a conversation's first two tokens
                batch["labels"][index, start : start + 2] = IGNORED_LABEL
        if any("lengths" in item for item in items):
            batch["position_ids"] = _positions(lengths, length)
        if self.feature_cache is not None:
            parts = [part for row, sizes in zip(ids, lengths, strict=True) for part in row.split(sizes)]
            # for rows that were never cached (another evaluation set), the target computes the features
            if all(part in self.feature_cache for part in parts):
                cached = iter([self.feature_cache[part] for part in parts])
                rows = [torch.cat([next(cached) for _ in sizes]) for sizes in lengths]
                batch["features"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch


def _starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _positions(lengths: list[list[int]], width: int) -> torch.Tensor:
    """Positions inside each conversation, and inside the padding after them, `[B, S]`."""
    rows = [torch.cat([torch.arange(part) for part in [*parts, width - sum(parts)]]) for parts in lengths]
    return torch.stack(rows)


__all__ = ["IGNORED_LABEL", "CoralDataCollator"]
