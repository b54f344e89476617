"""Encoded conversations."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from .chat import UnusableRow
from .conversations import encode_row, encode_row_parts, template_mode
from .sources import given_rows, read_rows


_REASONS_KEPT = 3


def encode_rows(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    max_length: int | None,
    counts: dict[str, int],
    eos_ids: Collection[int] = (),
    on_drop: Callable[[str], None] | None = None,
    modes: set[str] | None = None,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows -> ids and response masks, cut at `max_length`. Counts cut and skipped rows in `counts`.

    Args:
        rows, tokenizer, max_length, eos_ids: see [`ConversationDataset`].
        counts (`dict`): `truncated`, `dropped` and `unusable`, see [`no_counts`].
        on_drop (`Callable`, *optional*): receives the reason for each skipped row or answer.
        modes (`set[str]`, *optional*): receives the chat-template variables of each row, as JSON, if known.
    """
    tell = on_drop or (lambda reason: None)
    for index, row in enumerate(rows):
        name = f"row {(row.get('id', index) if isinstance(row, Mapping) else index)!r}"
        try:
            parts, unusable = encode_row_parts(row, tokenizer, name, eos_ids)
        except UnusableRow as error:
            parts, unusable = [], [error]
        if modes is not None and parts and (mode := template_mode(row, tokenizer)) is not None:
            modes.add(mode)
        for reason in unusable:
            counts["unusable"] += 1
            tell(str(reason))
        for ids, mask in parts:
            if max_length is not None and len(ids) > max_length:
                ids, mask = ids[:max_length], mask[:max_length]
                counts["truncated"] += 1
            # The first trainable row predicts x_2.
            if any(mask[2:]):
                yield ids, mask
            else:
                counts["dropped"] += 1
                tell(f"{name}: within max_length={max_length} it has no response token that a drafter predicts.")


def no_counts() -> dict[str, int]:
    """The counters of [`encode_rows`]: cut conversations, those without a response token, and unusable answers."""
    return {"truncated": 0, "dropped": 0, "unusable": 0}


def describe_counts(counts: Mapping[str, int], max_length: int | None) -> str | None:
    """One line about cut and skipped rows; None if there are none."""
    if not any(counts.values()):
        return None
    line = (
        f"{counts['truncated']} conversations cut at max_length={max_length}; {counts['dropped']} left out, without a response "
        "token within it that a drafter predicts"
    )
    unusable = counts["unusable"]
    return f"{line}; {unusable} answers left out that cannot be trained on" if unusable else line


class ConversationDataset(torch.utils.data.Dataset):
    """Encoded conversations: item i is `{"input_ids": LongTensor [S], "response_mask": BoolTensor [S]}`.

    Args:
        rows: training rows (see [`encode_row`]), or anything that [`read_rows`] reads: a path, a Hub id, a DataFrame.
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        max_length (`int`, *optional*): longer rows are cut there and counted in `truncated`. A row whose response begins
            later is skipped and counted in `dropped`. Answers that cannot be trained on are skipped and counted in
            `unusable`.
        eos_ids (`Collection[int]`): see [`encode_row`].

    Raises:
        ValueError: on a malformed row, or if no row is left.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Any = None,
        max_length: int | None = None,
        eos_ids: Collection[int] = (),
    ):
        self.counts = no_counts()
        self.modes: set[str] = set()
        self.left_out: list[str] = []  # the first few reasons
        self.conversations: list[tuple[torch.Tensor, torch.Tensor]] = [
            (torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool))
            for ids, mask in encode_rows(
                given_rows(rows), tokenizer, max_length, self.counts, eos_ids, self._leave_out, self.modes
            )
        ]
        if not self.conversations:
            raise nothing_to_train(max_length, self.left_out)

    def _leave_out(self, reason: str) -> None:
        if len(self.left_out) < _REASONS_KEPT:
            self.left_out.append(reason)

    @property
    def truncated(self) -> int:
        return self.counts["truncated"]

    @property
    def dropped(self) -> int:
        return self.counts["dropped"]

    @property
    def unusable(self) -> int:
        return self.counts["unusable"]

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self.conversations[index]
        return {"input_ids": ids.long(), "response_mask": mask}

    @property
    def num_response_tokens(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.conversations)

    def response_counts(self, vocab_size: int) -> torch.Tensor:
        """The number of occurrences of each id in the responses, `[V]`."""
        ids = torch.cat([ids[mask] for ids, mask in self.conversations])
        return torch.bincount(ids.long(), minlength=vocab_size)


def nothing_to_train(max_length: int | None, reasons: list[str]) -> ValueError:
    """The error if no row is left, with the first reason."""
    why = f" ({reasons[0]})" if reasons else ""
    return ValueError(
        f"No conversation has a response token within max_length={max_length}: nothing to train on{why}. Raise it, or give "
        "other rows."
    )


def check_ids(dataset: Any, vocab_size: int) -> None:
    """Raises `ValueError` if a conversation contains an id that the target lacks. A stream checks while it is read."""
    if dataset is None or not hasattr(dataset, "conversations"):
        return
    largest = max((int(ids.max()) for ids, _ in dataset.conversations), default=0)
    if largest >= vocab_size:
        raise unknown_id(largest, vocab_size)


def unknown_id(token: int, vocab_size: int) -> ValueError:
    """The error for an id beyond the target's vocabulary."""
    return ValueError(
        f"The data contains token id {token}, but the target's vocabulary ends at {vocab_size - 1}: these ids were "
        "made with another tokenizer. Use the responses of this target."
    )


def check_lengths(dataset: Any, positions: int | None) -> None:
    """Raises `ValueError` if a conversation has more tokens than the target has positions. A stream checks while it is read."""
    if dataset is None or positions is None or not hasattr(dataset, "conversations"):
        return
    longest = max((len(ids) for ids, _ in dataset.conversations), default=0)
    if longest > positions:
        raise too_long(longest, positions)


def too_long(length: int, positions: int) -> ValueError:
    """The error for a conversation beyond the target's positions."""
    return ValueError(
        f"A conversation has {length} tokens, but the target has only {positions} positions (max_position_embeddings), and its "
        f"features beyond them are meaningless: cut conversations with max_length={positions} (--max_length)."
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
    "describe_counts",
    "encode_row",
    "encode_row_parts",
    "no_counts",
    "preview",
    "read_rows",
]
