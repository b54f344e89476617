"""Messages -> token ids and the mask of the target's own tokens."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .chat import ASSISTANT, THINK_END, THINK_START, UnusableRow, reasoning_of, render, tokenize


@dataclass
class Chat:
    """A conversation to train on.

    Args:
        messages (`list[dict]`): messages with `role` and `content`.
        cut (`list[bool]`): for each response, whether it was cut off, so that it has no end of its own.
        first (`int`): the first response to train on.
        tools (`list`, *optional*): tools for the chat template.
        template_kwargs (`dict`): other variables of the chat template (`enable_thinking`, ...).
    """

    messages: list[dict[str, Any]]
    cut: list[bool]
    first: int = 0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Encoded:
    """Part of a conversation as token ids and response mask, with its text; None if the template does not write that
    text."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    text: str | None = ""

    def trimmed(self) -> tuple[list[int], list[bool]]:
        """Removes the text that the template writes after the last response (a newline), which is never generated."""
        last = max((index for index, flag in enumerate(self.mask) if flag), default=-1) + 1
        return self.ids[:last], self.mask[:last]


def eos_ids_of(target: Any) -> frozenset[int]:
    """The ids that end an answer of the target, from its generation config. They often differ from its tokenizer's EOS."""
    eos = target.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def encode_chat(
    chat: Chat, tokenizer: Any, where: str, eos_ids: Collection[int] = ()
) -> tuple[list[tuple[list[int], list[bool]]], list[UnusableRow]]:
    """Finds masks from prefix differences of the chat template: the text that a response adds to the prompt is the response.

    Works for templates without `{% generation %}`, and for targets without a template. Their plain text is the same as in
    generation: answers are followed by the next turn, and only the last one ends with EOS. Templates that render earlier
    turns differently (for example without their thinking) give several rows. An answer that does not continue the row before
    begins a new row, in which everything before it is only context.

    Args:
        chat ([`Chat`])
        tokenizer: the target's.
        where (`str`): the row's place, for errors.
        eos_ids (`Collection[int]`): the ids with which the target ends an answer.

    Returns:
        `tuple`: rows of ids and mask, each with a trained token, and the reasons for skipped answers.
    """
    parts: list[Encoded] = []
    unusable: list[UnusableRow] = []
    part = Encoded()
    places = [index for index, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
    for number, (place, is_cut) in enumerate(zip(places, chat.cut, strict=True)):
        try:
            longer = _with_answer(part, chat, place, is_cut, number >= chat.first, tokenizer, where, eos_ids)
        except UnusableRow as error:
            if number >= chat.first:
                unusable.append(error)
            continue
        if longer.ids[: len(part.ids)] != part.ids:
            parts.append(part)
        part = longer
    rows = [part.trimmed() for part in (*parts, part)]
    ids, mask = rows[-1]
    if ids and not getattr(tokenizer, "chat_template", None) and not chat.cut[-1]:
        end = tokenizer.eos_token_id if not eos_ids or tokenizer.eos_token_id in eos_ids else min(eos_ids)
        if end is not None:
            rows[-1] = [*ids, end], [*mask, True]
    return [row for row in rows if any(row[1])], unusable


def _with_answer(
    part: Encoded,
    chat: Chat,
    place: int,
    is_cut: bool,
    trained: bool,
    tokenizer: Any,
    where: str,
    eos_ids: Collection[int],
) -> Encoded:
    """`part` with the answer at `place` appended, or the answer after its own prompt if it does not continue `part`."""
    messages, kwargs = chat.messages, {"tools": chat.tools, **chat.template_kwargs}
    message = messages[place]
    prompt_text = render(tokenizer, messages[:place], where, add_generation_prompt=True, **kwargs)
    full_text = render(tokenizer, messages[: place + 1], where, **kwargs)
    prompt, full = tokenize(tokenizer, prompt_text), tokenize(tokenizer, full_text)
    located = full_text.startswith(prompt_text) or full[: len(prompt)] == prompt
    # the template does not recognise cut-off thinking, and writes empty thinking before it
    unfinished = is_cut and THINK_START in message["content"] and THINK_END not in message["content"]
    if unfinished or not located:
        response = _ids(tokenizer, _spoken(message, prompt_text, full_text, is_cut, where))
        ended = next((index + 1 for index, token in enumerate(response) if token in eos_ids), None)
        end = len(response) if is_cut else ended or _response_end(response, tokenizer)
        before = part if prompt[: len(part.ids)] == part.ids else Encoded()
        mask = before.mask + [False] * (len(prompt) - len(before.ids)) + [trained] * end
        # no later prompt continues a text that the template does not write
        return Encoded(prompt + response, mask + [False] * (len(response) - end), None)
    begin, known = 0, list[int]()  # the text from `begin` on was tokenised in one piece, after these ids
    if prompt[: len(part.ids)] != part.ids or full[: len(prompt)] != prompt:
        if part.text is None or not (prompt_text.startswith(part.text) and full_text.startswith(prompt_text)):
            return _with_answer(Encoded(), chat, place, is_cut, trained, tokenizer, where, eos_ids)
        # A token spans the border (a response that begins with a newline), which cannot happen in generation.
        prompt = part.ids + _ids(tokenizer, prompt_text[len(part.text) :])
        full = prompt + _ids(tokenizer, full_text[len(prompt_text) :])
        begin, known = len(prompt_text), prompt
    response = full[len(prompt) :]
    ends = [index + 1 for index, token in enumerate(response) if token in eos_ids]
    said = 0
    if is_cut or len(ends) > 1:  # find the one that closes the turn, and the template's text before it
        found = _content_end(full_text, len(prompt_text), message)
        until = [] if found is None else [*known, *(_ids if begin else tokenize)(tokenizer, full_text[begin:found])]
        said = max(_common_prefix(full, until) - len(prompt), 0)
        ends = [end for end in ends if end > said]
    # the target did not end a cut response, so the template's end of the turn is not the target's
    end = len(prompt) + (said if is_cut else ends[0] if ends else _response_end(response, tokenizer))
    new = [False] * (len(prompt) - len(part.ids)) + [trained] * (end - len(prompt)) + [False] * (len(full) - end)
    return Encoded(full, part.mask + new, full_text)


def _spoken(message: dict[str, Any], prompt_text: str, full_text: str, is_cut: bool, where: str) -> str:
    """The target's text, if the template leaves out its thinking (DeepSeek-R1) or the answer was cut off within it.

    Raises:
        UnusableRow: if the thinking is not in the row, or the template's rendering of the answer is not found.
    """
    said, reasoning = message["content"], reasoning_of(message)
    if reasoning and THINK_END not in said:
        said = f"{THINK_START}\n{reasoning}" + ("" if is_cut and not said else f"\n{THINK_END}\n\n{said}")
    opened = prompt_text.rstrip().endswith(THINK_START)
    if opened:
        said = said.lstrip().removeprefix(THINK_START).lstrip("\n")
    if is_cut:
        return said
    found = _content_end(full_text, _common_prefix(prompt_text, full_text), {"content": _visible(message)})
    if THINK_END not in said or found is None:
        lacks = "the row has none" if opened and found is not None else "responses cannot be located in it"
        raise UnusableRow(
            f"{where}: this tokenizer's chat template rewrites earlier turns or answers (their thinking), and {lacks}. Use "
            "rows of ids (prompt_ids / response_ids) as `coral-hf regenerate` writes them, for a server with "
            "--endpoint_token_ids true."
        )
    return said.rstrip() + full_text[found:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _common_prefix(first: Any, second: Any) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _content_end(text: str, start: int, message: dict[str, Any]) -> int | None:
    """The end of a response's content in `text`, searched from `start` on. Templates trim it and write before it."""
    reasoning = (reasoning_of(message) or "").strip()
    if reasoning and (place := text.find(reasoning, start)) >= 0:
        start = place + len(reasoning)
    for content in (message["content"].strip(), _visible(message)):  # with its thinking, or without
        if (place := text.find(content, start)) >= 0:
            return place + len(content)
    return None


def _visible(message: dict[str, Any]) -> str:
    """A response's content without its thinking."""
    return message["content"].split(THINK_END)[-1].strip()


def _response_end(response: list[int], tokenizer: Any) -> int:
    """The index after the tokenizer's EOS if that closes the response, else the end."""
    tail = range(len(response) - 1, max(len(response) - 4, -1), -1)
    return next((index + 1 for index in tail if response[index] == tokenizer.eos_token_id), len(response))


__all__ = ["Chat", "encode_chat", "eos_ids_of"]
