"""Prompts as everything reads them: a row of turns or of chat messages, and the text of a chat template it stands for."""

from collections.abc import Sequence
from typing import Any


ASSISTANT = "assistant"
_ANSWERABLE = {"system", "user", ASSISTANT}


def read_prompt_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of `turns`, or of chat `messages`, as one of turns with a `system` text where it has one.

    Of messages the user's are the turns: what the assistant said is left for the target to say. Other keys are kept.

    Args:
        row (`dict`), where (`str`): its place, for errors.

    Raises:
        ValueError: if there are no turns, or they or the system text are not strings.
    """
    if isinstance(row.get("messages"), list) and not isinstance(row.get("turns"), list):
        row = _user_turns(row, where)
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(
            f'{where}: "turns" must be a non-empty list of strings, or "messages" hold those of a user; got '
            f"{str(turns)[:60]!r}."
        )
    check_system(row, where)
    return row


def _user_turns(row: dict[str, Any], where: str) -> dict[str, Any]:
    messages = check_messages(row["messages"], where)
    if unknown := sorted({message["role"] for message in messages} - _ANSWERABLE):
        raise ValueError(
            f"{where}: messages of role {', '.join(unknown)} cannot be answered again; leave the row out."
        )
    row = {key: value for key, value in row.items() if key != "messages"}
    row["turns"] = [message["content"] for message in messages if message["role"] == "user"]
    systems = [message["content"] for message in messages if message["role"] == "system"]
    if systems and row.get("system") is None:
        row["system"] = "\n\n".join(systems)
    return row


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Raises `ValueError` unless every message has a role and a text."""
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{where}: message {number} must be an object with the strings role and content; got {str(message)[:80]}."
            )
    return messages


def check_system(row: dict[str, Any], where: str) -> str | None:
    """A row's `system` text; `ValueError` if it is no text."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: system must be a string; got {system!r}.")
    return system


def build_messages(turns: Sequence[str], responses: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """User turns and the responses so far (at most one a turn) as the messages of a chat template."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if index < len(responses):
            messages.append({"role": ASSISTANT, "content": responses[index]})
    return messages


def render(tokenizer: Any, messages: list[dict[str, str]], where: str, **kwargs: Any) -> str:
    """Messages as text by the chat template; `ValueError` naming `where` if it refuses them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{where}: the target's chat template refuses the roles {roles} ({error}). Put a system text in front of the "
            "first user turn, and let user and assistant take turns."
        ) from error


def encode_messages(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[int]:
    """Ids of a conversation up to the point where the next answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        # A base model: system text, turns and answers one after the other, as plain text.
        return list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    text = render(tokenizer, messages, where, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


__all__ = [
    "ASSISTANT",
    "build_messages",
    "check_messages",
    "check_system",
    "encode_messages",
    "read_prompt_row",
    "render",
]
