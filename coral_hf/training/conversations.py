"""Schemas of training rows, and one row -> token ids and response mask."""

from collections.abc import Mapping
from typing import Any

from ..prompt_rows import ASSISTANT, build_messages, check_messages, check_system, render


# The columns by which a row's schema is recognised, in this order.
SCHEMAS = {
    "ids": ("prompt_ids", "response_ids"),
    "masked": ("input_ids", "response_mask"),
    "text": ("turns", "responses"),
    "messages": ("messages",),
    "plain": ("text",),
}


def schema_of(row: dict[str, Any], where: str) -> str:
    """Which of [`SCHEMAS`] a row follows; `ValueError` naming `where` if none."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is {str(row)[:60]!r}, of type {type(row).__name__}: give objects with the columns of one of "
            f"{list(SCHEMAS.values())}; a text is {{'text': ...}}."
        )
    for name, columns in SCHEMAS.items():
        kind = str if name == "plain" else list
        if all(isinstance(row.get(column), kind) for column in columns):
            return name
    raise ValueError(
        f"{where} has columns {sorted(row)}: expected one of {list(SCHEMAS.values())}, lists except for text "
        "(prompts alone are answered by `coral-hf regenerate`)."
    )


def encode_row(row: dict[str, Any], tokenizer: Any = None, where: str = "row") -> tuple[list[int], list[bool]]:
    """One training row -> token ids and response mask, both of length S.

    Args:
        row (`dict`): by schema: `prompt_ids` and `response_ids`; `input_ids` and `response_mask`; `turns` and `responses`
            (texts, with an optional `system` text, and `finish_reasons`, of which "length" says that a response was cut
            and does not end there); `messages` of `role` and `content`, of which the assistant's are trained; or `text`,
            all of it trained.
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        where (`str`): the row's place, for errors.

    Raises:
        ValueError: if lengths disagree, or if no token is a response token.
    """
    schema = schema_of(row, where)
    if schema == "ids":
        ids = [*row["prompt_ids"], *row["response_ids"]]
        mask = [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"])
    elif schema == "masked":
        ids, mask = list(row["input_ids"]), [bool(flag) for flag in row["response_mask"]]
    elif tokenizer is None:
        raise ValueError(f"{where}: text rows (schema {schema!r}) need the target's tokenizer (processing_class).")
    elif schema == "plain":
        ids = list(tokenizer(row["text"])["input_ids"])
        mask = [True] * len(ids)
    else:
        ids, mask = _encode_messages(*messages_of(row, schema, where), tokenizer, where)
    if len(ids) != len(mask):
        raise ValueError(f"{where}: {len(ids)} input_ids but {len(mask)} response_mask entries; they must align.")
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"{where}: token ids must be integers from 0 on; got {str(ids)[:60]}.")
    if not any(mask):
        raise ValueError(f"{where}: empty response mask, so there is nothing to train on; check the row's response.")
    return ids, mask


# Messages ------------------------------------------------------------------------------------------------------


def messages_of(row: dict[str, Any], schema: str, where: str) -> tuple[list[dict[str, str]], list[bool]]:
    """Messages of a row of texts, and of each of its responses whether it was cut off."""
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
    return messages, [reason == "length" for reason in reasons] or [False] * n_responses


def _encode_messages(messages: list[dict[str, str]], cut: list[bool], tokenizer: Any, where: str):
    """Masks by prefix differences of the chat template: what a response adds to the prompt is the response.

    Works for templates without `{% generation %}`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _encode_plain(messages, cut, tokenizer)
    text = ""
    ids: list[int] = []
    mask: list[bool] = []
    places = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    for place, is_cut in zip(places, cut, strict=True):
        prompt_text = render(tokenizer, messages[:place], where, add_generation_prompt=True)
        full_text = render(tokenizer, messages[: place + 1], where)
        prompt, full = _ids(tokenizer, prompt_text), _ids(tokenizer, full_text)
        if prompt[: len(ids)] != ids or full[: len(prompt)] != prompt:
            if not (prompt_text.startswith(text) and full_text.startswith(prompt_text)):
                raise ValueError(
                    f"{where}: this tokenizer's chat template rewrites earlier turns, so responses cannot be located "
                    "by prefix differences. Use rows of ids (prompt_ids / response_ids) as `coral-hf regenerate` "
                    "writes them."
                )
            # A token spans the border (a response that begins with a newline), which it cannot in generation.
            prompt = ids + _ids(tokenizer, prompt_text[len(text) :])
            full = prompt + _ids(tokenizer, full_text[len(prompt_text) :])
        end = _response_end(full, len(prompt), tokenizer)
        if is_cut:  # the target did not end here: what the template closes the turn with is not its own
            content = _ids(tokenizer, messages[place]["content"])
            end = len(prompt) + _common_prefix(full[len(prompt) : end], content)
        mask += [False] * (len(prompt) - len(ids)) + [True] * (end - len(prompt)) + [False] * (len(full) - end)
        ids, text = full, full_text
    # What the template puts after the last response's end (a newline) is never generated.
    last = max((index for index, flag in enumerate(mask) if flag), default=-1) + 1
    return ids[:last], mask[:last]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _response_end(ids: list[int], start: int, tokenizer: Any) -> int:
    """One past the last EOS token if one closes the response that begins at `start`, else the end."""
    tail = range(len(ids) - 1, max(len(ids) - 4, start - 1), -1)
    return next((index + 1 for index in tail if ids[index] == tokenizer.eos_token_id), len(ids))


def _encode_plain(messages: list[dict[str, str]], cut: list[bool], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A target without a chat template: the messages follow each other as plain text."""
    ids: list[int] = []
    mask: list[bool] = []
    answers = iter(cut)
    for message in messages:
        is_answer = message["role"] == ASSISTANT
        piece = list(tokenizer(message["content"], add_special_tokens=not ids and not is_answer)["input_ids"])
        if is_answer and not next(answers) and tokenizer.eos_token_id is not None:
            piece.append(tokenizer.eos_token_id)
        ids += piece
        mask += [is_answer] * len(piece)
    last = max((index for index, flag in enumerate(mask) if flag), default=-1) + 1
    return ids[:last], mask[:last]


__all__ = ["SCHEMAS", "encode_row", "messages_of", "schema_of"]
