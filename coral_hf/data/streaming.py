"""Training on streamed rows, which are read while they are used."""

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
    """Encoded conversations of rows that are read repeatedly, while they are used.

    The stream has no end: `max_steps` ends a training. It is shuffled (and packed) inside buffers of `buffer_size`
    conversations. The order depends only on seed and pass, so that a resumed training gets the same batches by reading the
    stream from its start. Length grouping, response counts and the feature cache need all rows and are not available.

    Args:
        rows (`Iterable[dict]`): training rows, iterated in every pass: a [`RowStream`] or a
            `datasets.IterableDataset`.
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        max_length (`int`): longer rows are cut there, or skipped if they then have no response token. Both are counted, and
            the first one is reported.
        vocab_size (`int`): the target's vocabulary size.
        seed (`int`), buffer_size (`int`): seed and buffer size of the shuffling.
        packing (`bool`): pack the conversations of a buffer into rows of `max_length`.
        positions (`int`, *optional*): the target's number of positions.
        eos_ids (`Collection[int]`): see [`encode_row`].
        origin ([`Origin`], *optional*): the target whose answers the rows should contain.

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
                "The rows are an iterator, which can only be read once: give an object that creates a new one for every pass "
                "(training.sources.RowStream, datasets.IterableDataset, a list)."
            )
        self.rows = rows if origin is None else WatchedRows(rows, origin)
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        self.seed, self.buffer_size, self.packing = seed, buffer_size, packing
        self.positions, self.eos_ids = positions, eos_ids
        self._told: set[str] = set()
        self.modes: set[str] = set()
        self._left_out: list[str] = []  # the first reason for a skipped row

    @cached_property
    def head(self) -> list[dict[str, torch.Tensor]]:
        """The first conversations of the stream, which identify it."""
        head = list(itertools.islice(self.conversations_in_order(), HEAD))
        if not head:
            raise nothing_to_train(self.max_length, self._left_out)
        return head

    def conversations_in_order(self, counts: dict[str, int] | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """One pass over the stream in its order. Counts cut and skipped rows in `counts`."""
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
        self._tell("dropped", f"Skipped, like any others of this kind: {reason}")

    def _tell(self, what: str, text: str) -> None:
        """Prints a message once."""
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
            finally:  # a training usually ends within a pass
                self._count(when, counts)


__all__ = ["StreamedConversations"]
