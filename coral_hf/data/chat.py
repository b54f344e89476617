"""Conversations as messages, and as text rendered by a target's chat template."""

import copy
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any


logger = logging.getLogger(__name__)

ASSISTANT = "assistant"
THINK_START, THINK_END = "<think>", "</think>"


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


class UnusableRow(ValueError):
    """Raised for a well-formed conversation, or an answer in it, that cannot be trained on with this target."""


def build_messages(
    turns: Sequence[str],
    responses: Sequence[str],
    system: str | None = None,
    reasonings: Sequence[str | None] = (),
) -> list[dict[str, str]]:
    """User turns and the responses so far (at most one per turn) as the messages of a chat template.

    Args:
        turns, responses (`Sequence[str]`), system (`str`, *optional*)
        reasonings (`Sequence[str]`): the thinking before each response, if it is not in the response's text.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if index < len(responses):
            messages.append({"role": ASSISTANT, "content": responses[index]})
            if index < len(reasonings) and (reasoning := reasonings[index]):
                messages[-1]["reasoning_content"] = reasoning
    return messages


def check_messages(messages: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Returns messages with text as their content. Other fields (`tool_calls`, `name`) are passed to the chat template.

    Raises:
        ValueError: with `where` and the message, if one has no role, or a content that is not text.
    """
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"{where} must be an object with the strings role and content; got {str(message)[:80]}. Fix it, or leave the row "
            "out."
        )
    # a table's columns are in every message, empty if unused
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        strange = [part for part in content if not _is_text(part)]
        if strange:
            kind = strange[0].get("type") if isinstance(strange[0], Mapping) else type(strange[0]).__name__
            raise ValueError(
                f"{where} has a part of type {kind!r} in its content, but targets only read text: leave the row out, or "
                'write its content as texts, {"type": "text", "text": ...}.'
            )
        content = "\n".join(part["text"] for part in content)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        content = content or ""
    if not isinstance(content, str):
        raise ValueError(
            f"{where} must be an object with the strings role and content (or tool_calls instead of content); got "
            f"{str(message)[:80]}. Fix it, or leave the row out."
        )
    return {**message, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_call(call: Any) -> Any:
    """A tool call whose arguments are an object, as chat templates expect. OpenAI's are a JSON string."""
    call = without_none(call)
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """The thinking of a message outside its content, under any of the common names."""
    return next((message[name] for name in _REASONING if isinstance(message.get(name), str) and message[name]), None)


_REASONING = ("reasoning_content", "reasoning", "thinking")


def _for_templates(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with its thinking under every name that templates read."""
    reasoning = reasoning_of(message)
    if reasoning is None:
        return message
    names = ["reasoning_content"]
    if not (message.get("content") and message.get("tool_calls")):  # gpt-oss rejects thinking with both
        names.append("thinking")
    return {**message, **dict.fromkeys(names, reasoning)}


def check_tools(row: dict[str, Any], where: str) -> list[Any] | None:
    """A row's `tools`, a list or its JSON, for the chat template.

    Raises:
        ValueError: if it is neither.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: tools is not JSON ({error}); give a list of tools.") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: tools must be a list of tools; got {str(tools)[:80]!r}.")
    return without_none(tools)


def without_none(value: Any) -> Any:
    """A nested value without empty fields, because a table has every field of any row in all rows."""
    if isinstance(value, Mapping):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def check_system(row: dict[str, Any], where: str) -> str | None:
    """A row's `system` text; `ValueError` if it is not text."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: system must be a string; got {system!r}.")
    return system


def check_template_kwargs(value: Any, where: str) -> dict[str, Any]:
    """Variables of a chat template, given as an object or its JSON, as a dict. None and empty values give an empty dict.

    Raises:
        ValueError: if the value is neither, or if it sets a variable that the package itself sets.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); give an object, such as {_EXAMPLE}.") from error
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where} must be an object of variables, such as {_EXAMPLE}; got {str(value)[:60]!r}.")
    if taken := sorted(_DECIDED & value.keys()):
        raise ValueError(f"{where} sets {taken[0]}, which depends on the row: leave it out.")
    return without_none(value)


def with_template_kwargs(tokenizer: Any, given: Any, option: str = "--chat_template_kwargs") -> Any:
    """A copy of a tokenizer whose chat template is rendered with these variables. Variables of a row take precedence.

    Args:
        tokenizer: the target's.
        given (`dict` or `str`, *optional*): see [`check_template_kwargs`]. Without any, the tokenizer itself is returned.
        option (`str`): the option that set them, for errors.

    Raises:
        ValueError: for variables that the chat template does not read.
    """
    kwargs = check_template_kwargs(given, option)
    if not kwargs:
        return tokenizer
    templates = getattr(tokenizer, "chat_template", None) or ""
    text = " ".join(templates.values()) if isinstance(templates, dict) else templates
    if unread := sorted(name for name in kwargs if not re.search(rf"\b{re.escape(name)}\b", text)):
        raise ValueError(f"{option} sets {unread[0]}, which this target's chat template does not read: leave it out.")
    tokenizer = copy.copy(tokenizer)
    tokenizer.coral_template_kwargs = kwargs
    return tokenizer


def template_kwargs_of(tokenizer: Any) -> dict[str, Any]:
    """The variables that [`with_template_kwargs`] set."""
    return getattr(tokenizer, "coral_template_kwargs", {})


_EXAMPLE = '{"enable_thinking": false}'
_DECIDED = {"messages", "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message"}
_DECIDED |= {"chat_template", "return_dict", "return_tensors"}


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, **kwargs: Any) -> str:
    """Renders messages as text: with the chat template, or as plain paragraphs for a target without one.

    Args:
        tokenizer: the target's.
        messages (`Sequence[dict]`): see [`check_messages`].
        where (`str`): their place, for errors.
        **kwargs: `tools`, `add_generation_prompt` and other variables of the chat template.

    Raises:
        UnusableRow: with `where`, if the template rejects them.
    """
    if not getattr(tokenizer, "chat_template", None):
        _say_once(
            "The tokenizer has no chat template: messages are joined by blank lines, as plain text. For a chat model, set "
            "tokenizer.chat_template, or use the model's own tokenizer."
        )
        return "\n\n".join(message["content"] for message in messages)
    from jinja2 import TemplateError

    kwargs = {**template_kwargs_of(tokenizer), **kwargs}
    try:
        return tokenizer.apply_chat_template([_for_templates(one) for one in messages], tokenize=False, **kwargs)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UnusableRow(
            f"{where}: the target's chat template rejects the roles {roles} ({error}). Put a system text before the first user "
            "turn, and alternate between user and assistant."
        ) from error


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text from [`render`]. Templates write special tokens themselves; plain text gets the tokenizer's."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    return list(tokenizer(text, add_special_tokens=not templated)["input_ids"])


def encode_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids of a conversation up to the point where the next answer begins."""
    kwargs = template_kwargs or {}
    return tokenize(tokenizer, render(tokenizer, messages, where, add_generation_prompt=True, **kwargs))


__all__ = [
    "ASSISTANT",
    "THINK_END",
    "THINK_START",
    "UnusableRow",
    "build_messages",
    "check_messages",
    "check_system",
    "check_template_kwargs",
    "check_tools",
    "encode_messages",
    "reasoning_of",
    "render",
    "template_kwargs_of",
    "tokenize",
    "with_template_kwargs",
]
