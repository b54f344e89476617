"""Converts a training row to token ids and a response mask."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from .chat import (
    ASSISTANT,
    UnusableRow,
    build_messages,
    check_messages,
    check_system,
    check_template_kwargs,
    check_tools,
    template_kwargs_of,
)
from .formats import Format
from .response_masks import Chat, encode_chat
from .row_reader import check_answered, read_row


_MOST_IDS = 2**31  # conversations are kept in int32
# Finish reasons of an answer that the target itself ended, in OpenAI, TGI and others.
_ENDED = {"stop", "eos", "eos_token", "end_turn", "tool_calls", "function_call"}


def encode_row(
    row: dict[str, Any], tokenizer: Any = None, where: str = "row", eos_ids: Collection[int] = ()
) -> tuple[list[int], list[bool]]:
    """One training row that is trained in one piece -> token ids and response mask, both of length S.

    Raises:
        ValueError: as [`encode_row_parts`], and if its answers are trained apart, or one of them cannot be.
    """
    parts, unusable = encode_row_parts(row, tokenizer, where, eos_ids)
    if unusable:
        raise unusable[0]
    if len(parts) > 1:
        raise ValueError(f"{where}: its answers are trained in {len(parts)} rows; use encode_row_parts.")
    return parts[0]


def encode_row_parts(
    row: dict[str, Any], tokenizer: Any = None, where: str = "row", eos_ids: Collection[int] = ()
) -> tuple[list[tuple[list[int], list[bool]]], list[UnusableRow]]:
    """One training row -> rows of token ids and response mask, each pair of one length.

    There is normally one row. Some chat templates render earlier answers differently later (Qwen3 and GLM-4.5 leave out their
    thinking). For these, each answer is trained after its own prompt, in its own row.

    Args:
        row (`dict`): a row in any format of docs/data_formats.md, with an answer. Rows of `turns` and `responses` or of
            `messages` may also have a `system` text, `finish_reasons` (all except "stop" and its equivalents mean that the
            response was cut) and `first_turn` (earlier responses are only context). Of messages, the assistant's are
            trained; of `text`, all of it. The columns `tools` and `chat_template_kwargs` (`enable_thinking`, ...) go to the
            chat template. `reasonings` of responses and `reasoning_content` of messages are the thinking before an answer.
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        where (`str`): the row's place, for errors.
        eos_ids (`Collection[int]`): the ids with which the target ends an answer, for rows of text. By default, the
            tokenizer's EOS.

    Returns:
        `tuple`: the rows, and the reasons for skipped answers.

    Raises:
        ValueError: if lengths disagree.
        UnusableRow: if no token is a response token.
    """
    known, row = read_row(row, where)
    if known.kind == "ids":
        ids = [*row["prompt_ids"], *row["response_ids"]]
        mask = [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"])
    elif known.kind == "masked":
        ids, mask = list(row["input_ids"]), [bool(flag) for flag in row["response_mask"]]
        if strange := [flag for flag in row["response_mask"] if flag not in (0, 1)]:
            raise ValueError(f"{where}: response_mask must contain 0 and 1, or false and true; got {strange[0]!r}.")
    elif tokenizer is None:
        raise ValueError(f"{where}: text rows ({known.name}) need the target's tokenizer (processing_class).")
    elif known.kind == "text":
        ids = list(tokenizer(row["text"])["input_ids"])
        mask = [True] * len(ids)
    else:
        parts, unusable = encode_chat(chat_of(row, known, where), tokenizer, where, eos_ids)
        if not parts and not unusable:
            raise _nothing_trained(where)
        return parts, unusable
    if len(ids) != len(mask):
        raise ValueError(f"{where}: {len(ids)} input_ids but {len(mask)} response_mask entries; they must align.")
    strange = [token for token in ids if not isinstance(token, int) or not 0 <= token < _MOST_IDS]
    if strange:
        raise ValueError(
            f"{where}: token ids must be integers from 0 on, below 2**31; got {strange[0]!r} in {str(ids)[:60]}."
        )
    if not any(mask):
        raise _nothing_trained(where)
    return [(ids, mask)], []


def _nothing_trained(where: str) -> UnusableRow:
    return UnusableRow(f"{where}: empty response mask, so there is nothing to train on; check the row's response.")


# Messages ------------------------------------------------------------------------------------------------------


def chat_of(row: dict[str, Any], known: Format, where: str) -> Chat:
    """The conversation in a row of turns or messages. Raises `ValueError` if it has no answer."""
    system = check_system(row, where)
    if known.kind == "messages":
        messages = check_messages(row["messages"], where)
        if system is not None:
            if messages and messages[0]["role"] == "system":
                raise ValueError(f"{where} has both a system text and a system message; keep one of them.")
            messages = [{"role": "system", "content": system}, *messages]
        check_answered(known, row, where)
        n_responses = sum(message["role"] == ASSISTANT for message in messages)
    else:
        check_answered(known, row, where)
        turns, responses = row["turns"], row["responses"]
        if len(turns) != len(responses):
            raise ValueError(
                f"{where}: {len(turns)} turns but {len(responses)} responses; every turn needs its response."
            )
        reasonings = row.get("reasonings") or []
        if reasonings and (
            len(reasonings) != len(responses) or not all(isinstance(text, str | None) for text in reasonings)
        ):
            raise ValueError(f"{where}: reasonings must be a text or null for each of its {len(responses)} responses.")
        messages, n_responses = build_messages(turns, responses, system, reasonings), len(responses)
    reasons = row.get("finish_reasons") or []
    if reasons and len(reasons) != n_responses:
        raise ValueError(f"{where}: {len(reasons)} finish_reasons but {n_responses} responses; they must align.")
    first = row.get("first_turn") or 0
    if type(first) is not int or not 0 <= first <= n_responses:
        raise ValueError(f"{where}: first_turn must be a number from 0 to its {n_responses} responses; got {first!r}.")
    cut = [was_cut(reason) for reason in reasons] or [False] * n_responses
    kwargs = check_template_kwargs(row.get("chat_template_kwargs"), f"{where}: chat_template_kwargs")
    return Chat(messages, cut, first, check_tools(row, where), kwargs)


def template_mode(row: Mapping[str, Any], tokenizer: Any) -> str | None:
    """The chat-template variables with which a row was or is rendered, as JSON; None if unknown."""
    if "text" in row or not getattr(tokenizer, "chat_template", None):
        return None
    kwargs = check_template_kwargs(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if "prompt_ids" in row or "input_ids" in row:  # rendered already; rows of `regenerate` contain the variables
        return json.dumps(kwargs, sort_keys=True) if kwargs or row.get("target") is not None else None
    return json.dumps({**template_kwargs_of(tokenizer), **kwargs}, sort_keys=True)


def was_cut(finish_reason: str | None) -> bool:
    """Whether a response was cut ("length", "abort", "content_filter") instead of ended by the target."""
    return finish_reason is not None and str(finish_reason).lower() not in _ENDED


__all__ = [
    "build_messages",
    "chat_of",
    "check_messages",
    "check_system",
    "encode_row",
    "encode_row_parts",
    "template_mode",
]
