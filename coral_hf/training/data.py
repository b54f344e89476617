"""Encoded conversations and batches of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .conversations import encode_row
from .sources import read_rows


IGNORED_LABEL = -100


def encode_rows(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    max_length: int | None,
    counts: dict[str, int],
    eos_ids: Collection[int] = (),
    on_drop: Callable[[str], None] | None = None,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows -> ids and response masks, cut at `max_length`; adds what was cut and left out to `counts`.

    `on_drop` gets the name of each row that is left out, having no trainable token within `max_length`.
    """
    for index, row in enumerate(rows):
        name = f"row {(row.get('id', index) if isinstance(row, Mapping) else index)!r}"
        ids, mask = encode_row(row, tokenizer, name, eos_ids)
        if max_length is not None and len(ids) > max_length:
            ids, mask = ids[:max_length], mask[:max_length]
            counts["truncated"] += 1
        # The first trainable row predicts x_2.
        if any(mask[2:]):
            yield ids, mask
        else:
            counts["dropped"] += 1
            if on_drop is not None:
                on_drop(name)


class ConversationDataset(torch.utils.data.Dataset):
    """Encoded conversations: item i is `{"input_ids": LongTensor [S], "response_mask": BoolTensor [S]}`.

    Args:
        rows (`list[dict]`): training rows, see [`encode_row`].
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        max_length (`int`, *optional*): longer rows are cut there and counted in `truncated`; a row whose response
            begins later is left out and counted in `dropped`.
        eos_ids (`Collection[int]`): see [`encode_row`].

    Raises:
        ValueError: on a malformed row, or if no row is left.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        tokenizer: Any = None,
        max_length: int | None = None,
        eos_ids: Collection[int] = (),
    ):
        counts = {"truncated": 0, "dropped": 0}
        self.conversations: list[tuple[torch.Tensor, torch.Tensor]] = [
            (torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool))
            for ids, mask in encode_rows(rows, tokenizer, max_length, counts, eos_ids)
        ]
        self.truncated, self.dropped = counts["truncated"], counts["dropped"]
        if not self.conversations:
            raise ValueError(
                f"No conversation has a response token within max_length={max_length}: nothing to train on. Raise it, or "
                "give other rows."
            )

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self.conversations[index]
        return {"input_ids": ids.long(), "response_mask": mask}

    @property
    def num_response_tokens(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.conversations)

    def response_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs in the responses, `[V]`."""
        ids = torch.cat([ids[mask] for ids, mask in self.conversations])
        return torch.bincount(ids.long(), minlength=vocab_size)


def check_ids(dataset: Any, vocab_size: int) -> None:
    """Raises `ValueError` if a conversation holds an id that the target does not have; a stream checks on its way."""
    if dataset is None or not hasattr(dataset, "conversations"):
        return
    largest = max((int(ids.max()) for ids, _ in dataset.conversations), default=0)
    if largest >= vocab_size:
        raise unknown_id(largest, vocab_size)


def unknown_id(token: int, vocab_size: int) -> ValueError:
    """The error for an id past the target's vocabulary."""
    return ValueError(
        f"The data holds token id {token}, but the target's vocabulary ends at {vocab_size - 1}: these ids were "
        "made with another tokenizer. Use the responses of this target."
    )


def check_lengths(dataset: Any, positions: int | None) -> None:
    """Raises `ValueError` if a conversation is longer than the target has positions; a stream checks on its way."""
    if dataset is None or positions is None or not hasattr(dataset, "conversations"):
        return
    longest = max((len(ids) for ids, _ in dataset.conversations), default=0)
    if longest > positions:
        raise too_long(longest, positions)


def too_long(length: int, positions: int) -> ValueError:
    """The error for a conversation past the target's positions."""
    return ValueError(
        f"A conversation has {length} tokens, but the target has {positions} positions (max_position_embeddings), past "
        f"which its features mean nothing: cut it there with max_length={positions} (--max_length)."
    )


def preview(item: dict[str, torch.Tensor], tokenizer: Any) -> str:
    """The first sample as text, its trained tokens between `⟦` and `⟧`."""
    pieces, inside = [], False
    for token, trained in zip(item["input_ids"].tolist(), item["response_mask"].tolist(), strict=True):
        if trained != inside:
            pieces.append("⟦" if trained else "⟧")
            inside = trained
        pieces.append(tokenizer.decode([token]))
    return "".join([*pieces, "⟧" if inside else ""])


@dataclass
class CoralDataCollator:
    """Pads rows of one or several conversations on the right.

    Returns a dict of `input_ids` `[B, S]`, `document_ids` `[B, S]` (a row's conversations count from 0, padding is -1),
    `labels` `[B, S]` (the id where it is a trainable response token, else -100; `Trainer` counts them to scale
    accumulated losses); for packed rows (items with `lengths`, see [`PackedConversations`]) `position_ids` `[B, S]`,
    which begin anew at each conversation; and, with a feature cache that holds all conversations, `features`
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
                # no row of the drafter predicts a conversation's first two tokens
                batch["labels"][index, start : start + 2] = IGNORED_LABEL
        if any("lengths" in item for item in items):
            batch["position_ids"] = _positions(lengths, length)
        if self.feature_cache is not None:
            parts = [part for row, sizes in zip(ids, lengths, strict=True) for part in row.split(sizes)]
            # rows that were never cached (another evaluation set) leave the features to the target
            if all(part in self.feature_cache for part in parts):
                cached = iter([self.feature_cache[part] for part in parts])
                rows = [torch.cat([next(cached) for _ in sizes]) for sizes in lengths]
                batch["features"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch


def _starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _positions(lengths: list[list[int]], width: int) -> torch.Tensor:
    """Positions inside each conversation, and inside the padding behind them, `[B, S]`."""
    rows = [torch.cat([torch.arange(part) for part in [*parts, width - sum(parts)]]) for parts in lengths]
    return torch.stack(rows)


__all__ = [
    "ConversationDataset",
    "CoralDataCollator",
    "check_ids",
    "check_lengths",
    "encode_row",
    "preview",
    "read_rows",
]
