"""The list of row formats. Reading, error messages and docs/data_formats.md all use it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .chat import ASSISTANT, check_messages


Row = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bard": ASSISTANT,
    "bing": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles for the assistant's calls


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Args:
        name (`str`): the printed name.
        kind (`str`): the kind of row that it becomes: `ids` (`prompt_ids`, `response_ids`), `masked` (`input_ids`,
            `response_mask`), `turns` (with or without `responses`), `messages` or `text`.
        columns (`tuple[str, ...]`): columns that identify the format. A row must have all of them; the first one leads.
        example (`str`): an example line.
        fits (`Callable`): whether a row with these columns has this format.
        read (`Callable`): converts such a row, given its place for errors, to a row of that kind.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    example: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, str], Row]

    def matches(self, row: Row) -> bool:
        return all(row.get(column) is not None for column in self.columns) and self.fits(row)


# Readers of single formats -------------------------------------------------------------------------------------


def _as_it_is(row: Row, where: str) -> Row:
    return row


def _refuse(row: Row, name: str, wanted: str, where: str, example: str | None = None) -> ValueError:
    return ValueError(
        f'{where}: "{name}" must be {wanted}, got {str(row.get(name))[:60]!r}. An example: {example or example_of(name)}'
    )


def example_of(column: str) -> str:
    """An example line of the first format that begins with this column."""
    return next(known.example for known in FORMATS if known.columns[0] == column)


def _rest(row: Row, *own: str) -> Row:
    """A row without the columns that were read, and without those that identify another format."""
    formats = {column for known in FORMATS for column in known.columns} - {"question_id"}
    read = {"system", "system_prompt", *own, *formats}
    system = row.get("system") or row.get("system_prompt")  # empty in data sets without one
    return {**{name: row[name] for name in row if name not in read}, **({"system": system} if system else {})}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _turns(row: Row, where: str) -> Row:
    if not _texts(row["turns"]) or not row["turns"]:
        raise _refuse(row, "turns", "a non-empty list of strings", where)
    if row.get("responses") is None:
        return {name: value for name, value in row.items() if name != "responses"}
    if not _texts(row["responses"]):
        raise _refuse(row, "responses", "a list of strings", where, example_of("turns"))
    return row


def _messages(row: Row, where: str) -> Row:
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise _refuse(row, "messages", "a non-empty list of objects", where)
    return row


def _sharegpt(row: Row, where: str) -> Row:
    name = "conversations" if row.get("conversations") is not None else "conversation"
    if not isinstance(row[name], list) or not row[name]:
        raise _refuse(row, name, "a non-empty list of objects", where)
    messages = [_sharegpt_message(turn, f"{where}: turn {index}") for index, turn in enumerate(row[name])]
    return {**_rest(row), "messages": messages}


def _sharegpt_message(turn: Any, where: str) -> Row:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} must be an object, got {str(turn)[:60]!r}. An example: {_SHAREGPT}")
    turn = {name: value for name, value in turn.items() if value is not None}
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker in _CALLS and isinstance(said, str):
        return {"role": ASSISTANT, "content": "", "tool_calls": [{"type": "function", "function": _call(said, where)}]}
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        known = ", ".join((*_ROLES, *_CALLS))
        raise ValueError(f"{where} is from {speaker!r}; the known speakers are {known}. An example: {_SHAREGPT}")
    kept = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**kept, "role": _ROLES[speaker.lower()], **({} if said is None else {"content": said})}


def _call(said: str, where: str) -> Row:
    try:
        call = json.loads(said)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict):
        raise ValueError(f"{where} must be a call as a JSON object, got {said[:60]!r}; fix it, or leave the row out.")
    return call


def _single_turn(prompt: str, *answers: str, context: tuple[str, ...] = ()) -> Callable[[Row, str], Row]:
    """Reads a prompt, its context and an answer, each from the first column that contains it."""

    def read(row: Row, where: str) -> Row:
        text, history = row[prompt], row.get("history") or []
        if not isinstance(text, str) or not text.strip():
            raise _refuse(row, prompt, "a text", where)
        if not isinstance(history, list) or not all(_texts(pair) and len(pair) == 2 for pair in history):
            raise _refuse(row, "history", "a list of pairs of strings", where, '[["Hi!", "Hello!"]]')
        about = next((row[name] for name in context if isinstance(row.get(name), str) and row[name].strip()), None)
        answer = next((row[name] for name in answers if isinstance(row.get(name), str)), None)
        turns = [*(pair[0] for pair in history), text if about is None else f"{text}\n\n{about}"]
        read = {**_rest(row, *answers, *context, "history"), "turns": turns}
        return read if answer is None else {**read, "responses": [*(pair[1] for pair in history), answer]}

    return read


def _conversational(row: Row, where: str) -> Row:
    """Reads TRL's format: messages up to the answer, and the messages of the answer. Only the answer is trained."""
    answer = row.get("completion")
    if isinstance(answer, str):
        answer = [{"role": ASSISTANT, "content": answer}]
    if not row["prompt"]:
        raise _refuse(row, "prompt", "a non-empty list of objects", where)
    if not (answer is None or isinstance(answer, list)):
        raise _refuse(row, "completion", "a list of objects", where, example_of("prompt"))
    context = check_messages(row["prompt"], where)
    first = sum(message["role"] == ASSISTANT for message in context) if answer else 0
    return {**_rest(row), "messages": [*context, *(answer or ())], **({"first_turn": first} if first else {})}


def _text(row: Row, where: str) -> Row:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise _refuse(row, "text", "a text", where)
    return row


def _lists(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[name], list) for name in names)


def _has_roles(row: Row) -> bool:
    turns = row["conversations"]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]


def _not_a_count(row: Row) -> bool:
    return not isinstance(row["turns"], int)


def _always(row: Row) -> bool:
    return True


_SHAREGPT = '{"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello!"}]}'

# In the order in which they are tried.
FORMATS: tuple[Format, ...] = (
    Format(
        "token ids, as regenerate writes them",
        "ids",
        ("prompt_ids", "response_ids"),
        '{"prompt_ids": [1, 15, 27], "response_ids": [31, 2]}',
        _lists("prompt_ids", "response_ids"),
        _as_it_is,
    ),
    Format(
        "token ids with a mask",
        "masked",
        ("input_ids", "response_mask"),
        '{"input_ids": [1, 15, 27, 31, 2], "response_mask": [0, 0, 0, 1, 1]}',
        _lists("input_ids", "response_mask"),
        _as_it_is,
    ),
    Format(
        "turns and responses",
        "turns",
        ("turns", "responses"),
        '{"turns": ["Hi!", "Who are you?"], "responses": ["Hello!", "A model."]}',
        _not_a_count,
        _turns,
    ),
    Format(
        "MT-bench questions",
        "turns",
        ("turns", "question_id"),
        '{"question_id": 81, "category": "writing", "turns": ["Hi!", "Who are you?"]}',
        _not_a_count,
        _turns,
    ),
    Format("turns", "turns", ("turns",), '{"turns": ["Hi!", "Who are you?"]}', _not_a_count, _turns),
    Format(
        "messages",
        "messages",
        ("messages",),
        '{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}',
        _always,
        _messages,
    ),
    Format(
        "conversations with role and content",
        "messages",
        ("conversations",),
        '{"conversations": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}',
        _has_roles,
        _sharegpt,
    ),
    Format(
        "ShareGPT conversations",
        "messages",
        ("conversations",),
        _SHAREGPT,
        _always,
        _sharegpt,
    ),
    Format(
        "a conversation with role and content",
        "messages",
        ("conversation",),
        '{"conversation": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}',
        lambda row: isinstance(row["conversation"], list),
        _sharegpt,
    ),
    Format(
        "Alpaca",
        "turns",
        ("instruction",),
        '{"instruction": "Translate to French.", "input": "Hi!", "output": "Salut !"}',
        _always,
        _single_turn("instruction", "output", "response", context=("input", "context")),
    ),
    Format(
        "conversational prompt and completion (TRL)",
        "messages",
        ("prompt",),
        '{"prompt": [{"role": "user", "content": "Hi!"}], "completion": [{"role": "assistant", "content": "Hello!"}]}',
        _lists("prompt"),
        _conversational,
    ),
    Format(
        "prompt and completion (TRL)",
        "turns",
        ("prompt", "completion"),
        '{"prompt": "Hi!", "completion": "Hello!"}',
        _always,
        _single_turn("prompt", "completion"),
    ),
    Format("prompt", "turns", ("prompt",), '{"prompt": "Hi!"}', _always, _single_turn("prompt", "response", "answer")),
    Format(
        "question and answer",
        "turns",
        ("question",),
        '{"question": "What is 2 + 3?", "answer": "5"}',
        _always,
        _single_turn("question", "answer", "response"),
    ),
    Format("text", "text", ("text",), '{"text": "Once upon a time there was a model."}', _always, _text),
)


__all__ = ["FORMATS", "Format", "Row", "example_of"]
