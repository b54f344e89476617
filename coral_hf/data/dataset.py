"""Encoded conversations."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from .conversations import encode_row
from .sources import read_rows


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


__all__ = [
    "ConversationDataset",
    "check_ids",
    "check_lengths",
    "encode_row",
    "preview",
    "read_rows",
]
