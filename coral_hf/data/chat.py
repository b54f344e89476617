"""Conversations as messages, and as the text that a target's chat template makes of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


ASSISTANT = "assistant"


def build_messages(turns: Sequence[str], responses: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """User turns and the responses so far (at most one a turn) as the messages of a chat template."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if index < len(responses):
            messages.append({"role": ASSISTANT, "content": responses[index]})
    return messages


def check_messages(messages: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Messages whose content is text, the rest (`tool_calls`, `name`) as it is for the chat template.

    Raises:
        ValueError: naming `where` and the message, if one has no role, or a content that is no text.
    """
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"{where} must be an object with the strings role and content; got {str(message)[:80]}. Mend it, or leave the row "
            "out."
        )
    # columns of a table stand in every message, empty where it has none
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        strange = [part for part in content if not _is_text(part)]
        if strange:
            kind = strange[0].get("type") if isinstance(strange[0], Mapping) else type(strange[0]).__name__
            raise ValueError(
                f"{where} has a part of type {kind!r} in its content, and targets read text alone: leave the row out, or "
                'write its content as texts, {"type": "text", "text": ...}.'
            )
        content = "\n".join(part["text"] for part in content)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        content = content or ""
    if not isinstance(content, str):
        raise ValueError(
            f"{where} must be an object with the strings role and content (which tool_calls can stand for); got "
            f"{str(message)[:80]}. Mend it, or leave the row out."
        )
    return {**message, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_call(call: Any) -> Any:
    """A call whose arguments are an object, as chat templates want them; OpenAI's are its JSON."""
    call = without_none(call)
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def check_tools(row: dict[str, Any], where: str) -> list[Any] | None:
    """A row's `tools`, a list or its JSON, for the chat template.

    Raises:
        ValueError: if they are neither.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: tools is no JSON ({error}); give a list of tools.") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: tools must be a list of tools; got {str(tools)[:80]!r}.")
    return without_none(tools)


def without_none(value: Any) -> Any:
    """A nested value without its empty fields, which a table keeps for every field of any of its rows."""
    if isinstance(value, Mapping):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def check_system(row: dict[str, Any], where: str) -> str | None:
    """A row's `system` text; `ValueError` if it is no text."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: system must be a string; got {system!r}.")
    return system


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, **kwargs: Any) -> str:
    """Messages as text: by the chat template, or for a target without one as paragraphs of plain text.

    Args:
        tokenizer: the target's.
        messages (`Sequence[dict]`): see [`check_messages`].
        where (`str`): their place, for errors.
        **kwargs: `tools` and `add_generation_prompt` of the chat template.

    Raises:
        ValueError: naming `where`, if the template refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages)
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{where}: the target's chat template refuses the roles {roles} ({error}). Put a system text in front of the "
            "first user turn, and let user and assistant take turns."
        ) from error


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of [`render`]: a template writes the special tokens itself, before plain text the tokenizer's stand."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    return list(tokenizer(text, add_special_tokens=not templated)["input_ids"])


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """Ids of a conversation up to the point where the next answer begins."""
    return tokenize(tokenizer, render(tokenizer, messages, where, add_generation_prompt=True))


__all__ = [
    "ASSISTANT",
    "build_messages",
    "check_messages",
    "check_system",
    "check_tools",
    "encode_messages",
    "render",
    "tokenize",
]
