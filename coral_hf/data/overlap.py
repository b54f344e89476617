"""Finds training prompts that are also in an evaluation file, because a drafter must be measured on other prompts."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .chat import check_messages
from .row_reader import read_row
from .sources import Reading, RowStream


PREFIX = 80  # texts with this many equal normalised characters have the same beginning
SHORTEST = 20  # shorter evaluation prompts ("hi") must match completely
STREAM_ROWS = 10_000  # rows of a stream that are checked


@dataclass
class Overlap:
    """The number of training conversations that contain a prompt of an evaluation file.

    Args:
        checked (`int`): conversations checked; unreadable (`int`): those without a readable user turn.
        exact (`int`): those with a user turn equal to an evaluation prompt; prefix (`int`): with the same beginning.
        examples (`list[tuple[str, str]]`): ids of the first ones, and their turns.
    """

    checked: int = 0
    unreadable: int = 0
    exact: int = 0
    prefix: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def warning(self, files: str) -> str | None:
        """One line to print; None if there is no overlap."""
        told = []
        if self.exact or self.prefix:
            name, text = self.examples[0]
            told.append(
                f"warning: {self.exact + self.prefix} of {self.checked} training conversations contain a prompt of {files} "
                f"({self.exact} exactly, {self.prefix} by its beginning), such as {name!r}: {text[:60]!r}. Remove them, "
                "or do not report figures measured on these files."
            )
        if self.unreadable:
            told.append(
                f"warning: in {self.unreadable} of {self.checked} training conversations no user turn was found, so they "
                f"were not compared with {files}."
            )
        return "\n".join(told) or None


class EvaluationPrompts:
    """Evaluation prompts, compared as a whole and by beginnings. Case, punctuation and spacing are ignored.

    Args:
        prompts (`Iterable[str]`)
    """

    def __init__(self, prompts: Iterable[str]):
        self.whole = {normalized for prompt in prompts if (normalized := _normalize(prompt))}
        self.beginnings = {prompt[:PREFIX] for prompt in self.whole if len(prompt) >= PREFIX}
        self.short = {prompt for prompt in self.whole if SHORTEST <= len(prompt) < PREFIX}
        self.lengths = sorted({len(prompt) for prompt in self.short})

    @classmethod
    def read(cls, files: list[str], tokenizer: Any = None) -> "EvaluationPrompts":
        """The user turns of files or data sets."""
        between = _turn_pattern(tokenizer)
        return cls(turn for _, _, row in Reading(files) for turn in user_turns(row, tokenizer, between))

    def kind_of(self, turn: str) -> str | None:
        """How a text matches a prompt: `"exact"`, `"prefix"` (by its beginning), or None."""
        text = _normalize(turn)
        if text in self.whole:
            return "exact"
        begins = any(text[:length] in self.short and text[length : length + 1] == " " for length in self.lengths)
        return "prefix" if begins or text[:PREFIX] in self.beginnings else None


def find_overlap(
    rows: Iterable[dict[str, Any]], prompts: "Iterable[str] | EvaluationPrompts", tokenizer: Any = None
) -> Overlap:
    """Compares user turns with evaluation prompts, as a whole and by beginnings. Case, punctuation and spacing are ignored.

    Beginnings match if the first 80 characters are equal, or if a turn begins with a whole evaluation prompt of 20 to 80
    characters. Paraphrases are not found.

    Args:
        rows (`Iterable[dict]`): training rows or prompt rows, see [`encode_row`].
        prompts (`Iterable[str]` or [`EvaluationPrompts`]): evaluation prompts.
        tokenizer (*optional*): the target's, to find user turns in rows of ids by its chat template.

    Returns:
        [`Overlap`]
    """
    known = prompts if isinstance(prompts, EvaluationPrompts) else EvaluationPrompts(prompts)
    between = _turn_pattern(tokenizer)
    found = Overlap()
    for index, row in enumerate(rows):
        found.checked += 1
        turns = list(user_turns(row, tokenizer, between))
        if not turns:
            found.unreadable += 1
            continue
        kinds: dict[str, Any] = {}
        for turn in turns:
            if (kind := known.kind_of(turn)) is not None:
                kinds.setdefault(kind, turn)
        if kinds:
            kind = "exact" if "exact" in kinds else "prefix"
            setattr(found, kind, getattr(found, kind) + 1)
            if len(found.examples) < 5:
                found.examples.append((str(row.get("id", index)), kinds[kind].strip()))
    return found


def warn_of_overlap(rows: Iterable[dict[str, Any]], files: list[str], tokenizer: Any = None) -> Overlap:
    """Prints a warning if `rows` (or a stream's first rows) overlap the prompts of evaluation files or data sets."""
    if isinstance(rows, RowStream):
        rows = itertools.islice(rows, STREAM_ROWS)
    found = find_overlap(rows, EvaluationPrompts.read(files, tokenizer), tokenizer)
    if (warning := found.warning(", ".join(map(os.fspath, files)))) is not None:
        print(warning, flush=True)
    return found


def user_turns(row: dict[str, Any], tokenizer: Any, between: re.Pattern | None) -> Iterator[str]:
    """The user's texts in a row of any format. In rows of ids, they are found `between` the template's marks."""
    where = f"row {row.get('id', '')!r}" if isinstance(row, Mapping) else "a row"
    known, row = read_row(row, where)
    if known.kind == "turns":
        yield from row["turns"]
    elif known.kind == "messages":
        yield from (
            message["content"] for message in check_messages(row["messages"], where) if message["role"] == "user"
        )
    elif known.kind == "text":
        yield row["text"]
    elif tokenizer is not None:
        text = tokenizer.decode(row["prompt_ids"] if known.kind == "ids" else row["input_ids"])
        if between is None:
            yield text
        else:
            yield from between.findall(_spaced(text))


def _turn_pattern(tokenizer: Any) -> re.Pattern | None:
    """A pattern of the text that a chat template writes around a user turn; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError

    mark = "\u2063turn\u2063"
    message = {"role": "user", "content": mark}

    def around(messages: list[dict[str, str]]) -> tuple[str, str]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(mark)
        return _spaced(before), _spaced(after)

    before, after = around([message])
    try:
        # the text before a turn, with and without a system text, ends with the turn's own header
        other, _ = around([{"role": "system", "content": "-"}, message])
        pairs = zip(reversed(before), reversed(other), strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        header = before[len(before) - shared :]
    except TemplateError:
        header = before
    if not header.strip() or not after.strip():
        return None
    return re.compile(re.escape(header.strip()) + "(.*?)" + re.escape(after.strip()), re.DOTALL)


def _spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _normalize(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


__all__ = ["EvaluationPrompts", "Overlap", "find_overlap", "warn_of_overlap"]
