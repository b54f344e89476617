"""Messages -> token ids and the mask of what the target itself says in them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .chat import ASSISTANT, render, tokenize


@dataclass
class Chat:
    """A conversation to train on.

    Args:
        messages (`list[dict]`): of `role` and `content`.
        cut (`list[bool]`): of each response whether it was cut off, so that its end is not its own.
        first (`int`): the first response that is trained.
        tools (`list`, *optional*): for the chat template.
    """

    messages: list[dict[str, Any]]
    cut: list[bool]
    first: int = 0
    tools: list[Any] | None = None


def eos_ids_of(target: Any) -> frozenset[int]:
    """The ids that end an answer of the target, of its generation config: often others than its tokenizer's EOS."""
    eos = target.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def encode_chat(chat: Chat, tokenizer: Any, where: str, eos_ids: Collection[int] = ()) -> tuple[list[int], list[bool]]:
    """Masks by prefix differences of the chat template: what a response adds to the prompt is the response.

    Works for templates without `{% generation %}`, and for targets without a template, whose plain text is that of
    generation: answers are followed by the next turn, and only the last one ends with EOS.

    Args:
        chat ([`Chat`])
        tokenizer: the target's.
        where (`str`): the row's place, for errors.
        eos_ids (`Collection[int]`): with which the target ends an answer.
    """
    messages = chat.messages
    text = ""
    ids: list[int] = []
    mask: list[bool] = []
    places = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    for number, (place, is_cut) in enumerate(zip(places, chat.cut, strict=True)):
        prompt_text = render(tokenizer, messages[:place], where, tools=chat.tools, add_generation_prompt=True)
        full_text = render(tokenizer, messages[: place + 1], where, tools=chat.tools)
        prompt, full = tokenize(tokenizer, prompt_text), tokenize(tokenizer, full_text)
        begin, before = 0, list[int]()  # the text from there on was tokenised as one, behind these ids
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
            begin, before = len(prompt_text), prompt
        response = full[len(prompt) :]
        ends = [index + 1 for index, token in enumerate(response) if token in eos_ids]
        if is_cut or len(ends) > 1:  # which of them closes the turn, and what the template writes before it
            found = _content_end(full_text, len(prompt_text), messages[place]["content"])
            until = (
                [] if found is None else [*before, *(_ids if begin else tokenize)(tokenizer, full_text[begin:found])]
            )
            spoken = max(_common_prefix(full, until) - len(prompt), 0)
            ends = [end for end in ends if end > spoken]
        # the target did not end a cut response: what the template closes the turn with is not its own
        end = len(prompt) + (spoken if is_cut else ends[0] if ends else _response_end(response, tokenizer))
        mask += (
            [False] * (len(prompt) - len(ids))
            + [number >= chat.first] * (end - len(prompt))
            + [False] * (len(full) - end)
        )
        ids, text = full, full_text
    # What the template puts after the last response's end (a newline) is never generated.
    last = max((index for index, flag in enumerate(mask) if flag), default=-1) + 1
    ids, mask = ids[:last], mask[:last]
    if ids and not getattr(tokenizer, "chat_template", None) and not chat.cut[-1]:
        end = tokenizer.eos_token_id if not eos_ids or tokenizer.eos_token_id in eos_ids else min(eos_ids)
        if end is not None:
            ids, mask = [*ids, end], [*mask, True]
    return ids, mask


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _content_end(text: str, start: int, content: str) -> int | None:
    """Where a response's content ends in `text`, searched from `start` on; templates trim it and write before it."""
    content = content.strip()
    place = text.find(content, start)
    return None if place < 0 else place + len(content)


def _response_end(response: list[int], tokenizer: Any) -> int:
    """One past the tokenizer's EOS if it closes the response, else the end."""
    tail = range(len(response) - 1, max(len(response) - 4, -1), -1)
    return next((index + 1 for index in tail if response[index] == tokenizer.eos_token_id), len(response))


__all__ = ["Chat", "encode_chat", "eos_ids_of"]
