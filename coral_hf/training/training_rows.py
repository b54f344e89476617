"""Converts a trainer's data argument to the data set that it trains on."""

import json
from typing import Any

from transformers.trainer_utils import has_length

from ..data.chat import check_template_kwargs
from ..data.dataset import ConversationDataset, describe_counts
from ..data.packing import PackedConversations
from ..data.response_masks import eos_ids_of
from ..data.response_origin import Origin, WatchedRows
from ..data.sources import given_rows
from ..data.streaming import StreamedConversations
from .arguments import CoralTrainingArguments


def encode_dataset(
    rows: Any, tokenizer: Any, args: CoralTrainingArguments, target: Any = None
) -> ConversationDataset | None:
    """Converts rows to a data set of conversations. The first process prints how many were cut, skipped or by another target.

    Args:
        rows, tokenizer, args: the trainer's.
        target (`PreTrainedModel`, *optional*): the target whose answers the rows should contain.
    """
    if rows is None or isinstance(rows, ConversationDataset):
        return rows
    rows = given_rows(rows)
    if (origin := _origin(target, args)) is not None:
        rows = WatchedRows(rows, origin)
    encoded = ConversationDataset(rows, tokenizer, args.max_length, _eos_ids(target))
    line = describe_counts(encoded.counts, args.max_length)
    if line is not None and args.process_index == 0:
        print(f"{line}. The first: {encoded.left_out[0]}" if encoded.left_out else f"{line}.")
    return encoded


def encode_training_dataset(
    rows: Any,
    tokenizer: Any,
    args: CoralTrainingArguments,
    vocab_size: int,
    positions: int | None = None,
    target: Any = None,
) -> tuple[ConversationDataset | None, Any]:
    """Training rows as conversations (None for a stream), and as rows of batches, packed or streamed.

    Raises:
        ValueError: for settings that do not work with a stream.
    """
    if rows is not None and not has_length(rows):
        return None, _stream(rows, tokenizer, args, vocab_size, positions, target)
    conversations = encode_dataset(rows, tokenizer, args, target)
    if conversations is None or not args.packing:
        return conversations, conversations
    packed = PackedConversations(conversations, args.max_length)
    if args.process_index == 0:
        print(
            f"{len(conversations)} conversations packed into {len(packed)} rows of at most {args.max_length} tokens."
        )
    return conversations, packed


def _stream(
    rows: Any,
    tokenizer: Any,
    args: CoralTrainingArguments,
    vocab_size: int,
    positions: int | None,
    target: Any,
) -> StreamedConversations:
    refused = {
        "cache_features": (args.cache_features, "its features are computed once, for rows that are known"),
        "loss_vocab_size": (args.loss_vocab_size, "it counts the tokens of all responses first"),
    }
    for name, (value, reason) in refused.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} does not work on a stream ({reason}): leave out one of the two.")
    if args.max_steps <= 0:
        raise ValueError("A stream has no end: set max_steps (--max_steps).")
    # Otherwise the first process would read for all and split its batches, which differ in width.
    args.accelerator_config.dispatch_batches = False
    return StreamedConversations(
        rows,
        tokenizer,
        args.max_length,
        vocab_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        buffer_size=args.stream_buffer_size,
        packing=args.packing,
        positions=positions,
        eos_ids=_eos_ids(target),
        origin=_origin(target, args),
    )


def template_kwargs(dataset: Any, args: CoralTrainingArguments) -> dict[str, Any] | None:
    """The chat-template variables that all rows so far share; None if they differ or are unknown."""
    modes: set[str] = getattr(getattr(dataset, "dataset", dataset), "modes", set())
    if len(modes) > 1:
        if args.process_index == 0:
            print(f"The rows use {len(modes)} modes of the chat template: {', '.join(sorted(modes))}.")
        return None
    return json.loads(next(iter(modes))) if modes else check_template_kwargs(args.chat_template_kwargs, "") or None


def _eos_ids(target: Any) -> frozenset[int]:
    return frozenset() if target is None else eos_ids_of(target)


def _origin(target: Any, args: CoralTrainingArguments) -> Origin | None:
    """The target to compare rows with, as determined by the first process."""
    return None if target is None or args.process_index else Origin.of(target)


def first_item(dataset: Any) -> dict[str, Any]:
    """The first conversation or row of a data set."""
    return dataset[0] if has_length(dataset) else dataset.head[0]


__all__ = ["encode_dataset", "encode_training_dataset", "first_item", "template_kwargs"]
