"""Training on rows that are read while they are used."""

import itertools
import random
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch

from .dataset import describe_counts, encode_rows, no_counts, nothing_to_train, too_long, unknown_id
from .packing import join, pack_lengths
from .response_origin import Origin, WatchedRows


HEAD = 64


class StreamedConversations(torch.utils.data.IterableDataset):
    """Encoded conversations of rows that are read, again and again, while they are used.

    The stream has no end: `max_steps` ends a training. It is shuffled (and packed) inside buffers of `buffer_size`
    conversations, by seed and pass alone, so that a resumed training finds every batch again by reading the stream from
    its start. What needs all rows at the same time (length grouping, response counts, the feature cache) is not to be had.

    Args:
        rows (`Iterable[dict]`): training rows, iterated in every pass: a [`RowStream`] or a
            `datasets.IterableDataset`.
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        max_length (`int`): longer rows are cut there, and left out without a response token before it: counted, and the
            first one told of.
        vocab_size (`int`): of the target.
        seed (`int`), buffer_size (`int`): of the shuffling.
        packing (`bool`): pack the conversations of a buffer into rows of `max_length`.
        positions (`int`, *optional*): that the target has.
        eos_ids (`Collection[int]`): see [`encode_row`].
        origin ([`Origin`], *optional*): the target whose answers the rows should hold.

    Raises:
        ValueError: while iterating, on a malformed row or a pass without a trainable row.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        vocab_size: int,
        seed: int = 0,
        buffer_size: int = 1024,
        packing: bool = False,
        positions: int | None = None,
        eos_ids: Collection[int] = (),
        origin: Origin | None = None,
    ):
        if iter(rows) is rows:
            raise ValueError(
                "The rows are an iterator, which can be read once only: give what creates a new one for every pass "
                "(training.sources.RowStream, datasets.IterableDataset, a list)."
            )
        self.rows = rows if origin is None else WatchedRows(rows, origin)
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        self.seed, self.buffer_size, self.packing = seed, buffer_size, packing
        self.positions, self.eos_ids = positions, eos_ids
        self._told: set[str] = set()
        self.modes: set[str] = set()
        self._left_out: list[str] = []  # the first reason

    @cached_property
    def head(self) -> list[dict[str, torch.Tensor]]:
        """The first conversations of the stream, by which it is recognised."""
        head = list(itertools.islice(self.conversations_in_order(), HEAD))
        if not head:
            raise nothing_to_train(self.max_length, self._left_out)
        return head

    def conversations_in_order(self, counts: dict[str, int] | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """One pass over the stream as it comes; adds what is cut and left out to `counts`."""
        counts = no_counts() if counts is None else counts
        rows = encode_rows(
            self.rows, self.tokenizer, self.max_length, counts, self.eos_ids, self._tell_of_drop, self.modes
        )
        for ids, mask in rows:
            if max(ids) >= self.vocab_size:
                raise unknown_id(max(ids), self.vocab_size)
            if self.positions is not None and len(ids) > self.positions:
                raise too_long(len(ids), self.positions)
            if counts["truncated"]:
                self._tell("cut", f"Conversations longer than max_length={self.max_length} are cut there.")
            yield {"input_ids": torch.tensor(ids), "response_mask": torch.tensor(mask, dtype=torch.bool)}

    def _tell_of_drop(self, reason: str) -> None:
        self._left_out = self._left_out or [reason]
        self._tell("dropped", f"Left out, and so are others like it: {reason}")

    def _tell(self, what: str, text: str) -> None:
        """Says something once."""
        if what not in self._told:
            self._told.add(what)
            print(text, flush=True)

    def _count(self, when: str, counts: dict[str, int]) -> None:
        if (line := describe_counts(counts, self.max_length)) is not None:
            print(f"{when}: {line}.", flush=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={worker.num_workers}: each worker would read the whole stream; use 0 or 1."
            )
        self.head  # noqa: B018  (raises for an empty stream, which would be read without end)
        for number in itertools.count():
            shuffle = random.Random(self.seed * 1_000_003 + number).shuffle
            counts = no_counts()
            conversations = self.conversations_in_order(counts)
            when = "In the pass over the stream that ends here"
            try:
                while buffer := list(itertools.islice(conversations, self.buffer_size)):
                    if self.packing:
                        places = pack_lengths([len(item["input_ids"]) for item in buffer], self.max_length)
                        buffer = [join([buffer[place] for place in row]) for row in places]
                    shuffle(buffer)
                    yield from buffer
                when = "One pass over the stream"
            finally:  # a training mostly ends within a pass
                self._count(when, counts)


__all__ = ["StreamedConversations"]
