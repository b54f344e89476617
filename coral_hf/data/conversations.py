"""Schemas of training rows, and one row -> token ids and response mask."""

from collections.abc import Collection, Mapping
from typing import Any

from .chat import ASSISTANT, build_messages, check_messages, check_system, check_tools
from .response_masks import Chat, encode_chat


# The columns by which a row's schema is recognised, in this order.
SCHEMAS = {
    "ids": ("prompt_ids", "response_ids"),
    "masked": ("input_ids", "response_mask"),
    "text": ("turns", "responses"),
    "messages": ("messages",),
    "plain": ("text",),
}

_MOST_IDS = 2**31  # conversations are kept in int32
# Finish reasons of an answer that the target ended, as OpenAI, TGI and others call them.
_ENDED = {"stop", "eos", "eos_token", "end_turn", "tool_calls", "function_call"}


def schema_of(row: dict[str, Any], where: str) -> str:
    """Which of [`SCHEMAS`] a row follows; `ValueError` naming `where` if none."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is {str(row)[:60]!r}, of type {type(row).__name__}: give objects with the columns of one of "
            f"{list(SCHEMAS.values())}; a text is {{'text': ...}}."
        )
    row = listed(row)
    for name, columns in SCHEMAS.items():
        kind = str if name == "plain" else list
        if all(isinstance(row.get(column), kind) for column in columns):
            return name
    raise ValueError(
        f"{where} has columns {sorted(row)}: expected one of {list(SCHEMAS.values())}, lists except for text "
        "(prompts alone are answered by `coral-hf regenerate`)."
    )


def listed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose tensors and arrays (data sets with a format have them) are lists."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


def encode_row(
    row: dict[str, Any], tokenizer: Any = None, where: str = "row", eos_ids: Collection[int] = ()
) -> tuple[list[int], list[bool]]:
    """One training row -> token ids and response mask, both of length S.

    Args:
        row (`dict`): by schema: `prompt_ids` and `response_ids`; `input_ids` and `response_mask`; `turns` and `responses`
            (texts, with an optional `system` text, `finish_reasons`, of which all but "stop" and its like say that a
            response was cut and does not end there, and `first_turn`, before which responses are context only); `messages`
            of `role` and `content` (a text or a list of text parts; or `tool_calls`), of which the assistant's are
            trained; or `text`, all of it trained. A `tools` column goes to the chat template.
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        where (`str`): the row's place, for errors.
        eos_ids (`Collection[int]`): the ids with which the target ends an answer, for rows of text; without them the
            tokenizer's EOS counts.

    Raises:
        ValueError: if lengths disagree, or if no token is a response token.
    """
    schema, row = schema_of(row, where), listed(row)
    if schema == "ids":
        ids = [*row["prompt_ids"], *row["response_ids"]]
        mask = [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"])
    elif schema == "masked":
        ids, mask = list(row["input_ids"]), [bool(flag) for flag in row["response_mask"]]
        if strange := [flag for flag in row["response_mask"] if flag not in (0, 1)]:
            raise ValueError(f"{where}: response_mask must hold 0 and 1, or false and true; got {strange[0]!r}.")
    elif tokenizer is None:
        raise ValueError(f"{where}: text rows (schema {schema!r}) need the target's tokenizer (processing_class).")
    elif schema == "plain":
        ids = list(tokenizer(row["text"])["input_ids"])
        mask = [True] * len(ids)
    else:
        ids, mask = encode_chat(chat_of(row, schema, where), tokenizer, where, eos_ids)
    if len(ids) != len(mask):
        raise ValueError(f"{where}: {len(ids)} input_ids but {len(mask)} response_mask entries; they must align.")
    strange = [token for token in ids if not isinstance(token, int) or not 0 <= token < _MOST_IDS]
    if strange:
        raise ValueError(
            f"{where}: token ids must be integers from 0 on, below 2**31; got {strange[0]!r} in {str(ids)[:60]}."
        )
    if not any(mask):
        raise ValueError(f"{where}: empty response mask, so there is nothing to train on; check the row's response.")
    return ids, mask


# Messages ------------------------------------------------------------------------------------------------------


def chat_of(row: dict[str, Any], schema: str, where: str) -> Chat:
    """The conversation in a row of texts."""
    system = check_system(row, where)
    if schema == "messages":
        messages = check_messages(row["messages"], where)
        if system is not None:
            if messages and messages[0]["role"] == "system":
                raise ValueError(f"{where} has a system text beside a system message; keep one of them.")
            messages = [{"role": "system", "content": system}, *messages]
        n_responses = sum(message["role"] == ASSISTANT for message in messages)
    else:
        turns, responses = row["turns"], row["responses"]
        if len(turns) != len(responses):
            raise ValueError(
                f"{where}: {len(turns)} turns but {len(responses)} responses; every turn needs its response."
            )
        for text in (*turns, *responses):
            if not isinstance(text, str):
                raise ValueError(f"{where}: turns and responses must be strings; got {text!r}.")
        messages, n_responses = build_messages(turns, responses, system), len(responses)
    reasons = row.get("finish_reasons") or []
    if reasons and len(reasons) != n_responses:
        raise ValueError(f"{where}: {len(reasons)} finish_reasons but {n_responses} responses; they must align.")
    first = row.get("first_turn") or 0
    if type(first) is not int or not 0 <= first <= n_responses:
        raise ValueError(f"{where}: first_turn must be a number from 0 to its {n_responses} responses; got {first!r}.")
    cut = [was_cut(reason) for reason in reasons] or [False] * n_responses
    return Chat(messages, cut, first, check_tools(row, where))


def was_cut(finish_reason: str | None) -> bool:
    """Whether a response ended by anything else ("length", "abort", "content_filter") than the target's own end."""
    return finish_reason is not None and str(finish_reason).lower() not in _ENDED


__all__ = [
    "SCHEMAS",
    "build_messages",
    "chat_of",
    "check_messages",
    "check_system",
    "encode_row",
    "listed",
    "schema_of",
]
