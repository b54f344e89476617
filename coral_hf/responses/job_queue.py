"""The turns that a target has not answered yet, in an order for efficient batching."""

import hashlib
import itertools
import json
import random
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.chat import build_messages, check_template_kwargs, encode_messages


# Prompts are sorted by length inside windows of this many per slot. Live rows then have similar lengths, so that attention,
# which costs as much as for the longest row, wastes little. The order over the whole file stays random.
WINDOW_PER_SLOT = 8


@dataclass
class Conversation:
    """A prompt row, its chat-template variables, and the target's answers so far: ids, or an endpoint's texts."""

    id: str
    turns: list[str]
    system: str | None = None
    answers: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """An answer on file (ids or text), the hash of its prompt if known (see [`prompt_hash`]), and the chat-template
    variables."""

    answer: Any
    prompt: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def prompt_hash(system: str | None, turns: Sequence[str]) -> str:
    """A hash of the user's part of a conversation up to a turn."""
    return hashlib.sha256(json.dumps([system, list(turns)]).encode()).hexdigest()[:12]


@dataclass
class Job:
    """A turn that is being answered."""

    conversation: Conversation
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)


def _encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, eos_ids: Collection[int]) -> list[int]:
    """Ids of the conversation so far, up to the beginning of the next answer."""
    texts = []
    for answer in conversation.answers:
        ids = answer[:-1] if answer and answer[-1] in eos_ids else answer
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    messages = build_messages(conversation.turns[: len(texts) + 1], texts, conversation.system)
    return encode_messages(tokenizer, messages, f"prompt {conversation.id!r}", conversation.template_kwargs)


def unanswered(
    prompts: Iterable[dict[str, Any]],
    on_file: dict[str, dict[int, Answered]],
    excluded: set[str],
    max_turns: int | None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Conversation], int]:
    """The conversations with turns to answer, including answers on file, and the number of excluded ones.

    `template_kwargs` are the chat-template variables for rows without their own.

    Raises:
        ValueError: if an id occurs twice, or an answer on file belongs to another text.
    """
    conversations: list[Conversation] = []
    seen: set[str] = set()
    n_excluded = 0
    for row in prompts:
        if row["id"] in seen:
            raise ValueError(f"prompt id {row['id']!r} occurs twice; ids must be unique.")
        seen.add(row["id"])
        if row["id"] in excluded:
            n_excluded += 1
            continue
        own = check_template_kwargs(row.get("chat_template_kwargs"), f"prompt {row['id']!r}: chat_template_kwargs")
        kwargs = {**(template_kwargs or {}), **own}
        conversation = Conversation(
            row["id"], list(row["turns"][:max_turns]), row.get("system"), template_kwargs=kwargs
        )
        answers = on_file.get(row["id"], {})
        for turn in range(len(conversation.turns)):
            if (found := answers.get(turn)) is None:
                break
            if found.prompt not in (None, prompt_hash(conversation.system, conversation.turns[: turn + 1])):
                raise ValueError(
                    f"prompt {conversation.id!r} differs from the one whose turn {turn} is answered on file: give the changed prompt "
                    "another id, or give another output file."
                )
            if found.template_kwargs != kwargs:
                raise ValueError(
                    f"prompt {conversation.id!r} is answered on file with chat_template_kwargs {found.template_kwargs}, but this run "
                    f"has {kwargs}; give another output file."
                )
            conversation.answers.append(found.answer)
        if len(conversation.answers) < len(conversation.turns):
            conversations.append(conversation)
    return conversations, n_excluded


class PromptQueue:
    """
    The remaining prompts, tokenised in advance and sorted by length inside a window. The next turn of a conversation goes to
    the front, so that it is answered before new conversations begin.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation],
        tokenizer: Any,
        eos_ids: Collection[int],
        window: int,
        max_prompt_tokens: int,
        rng: random.Random,
    ):
        self.source = list(conversations)
        rng.shuffle(self.source)
        self.source.reverse()  # popped from the end
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.window, self.max_prompt_tokens = window, max_prompt_tokens
        self.ready: deque[Job] = deque()
        self.too_long: list[tuple[str, int, int]] = []
        self.n_turns_left_out = 0
        self.downwards = False

    def common_prefix(self) -> list[int]:
        """The ids with which all prompts of the next window begin, mostly from the chat template."""
        self._fill()
        prompts = [job.prompt_ids for job in self.ready]
        if len(prompts) < 2:
            return []
        first, last = min(prompts), max(prompts)
        pairs = zip(first[:-1], last[:-1], strict=False)
        return [pair[0] for pair in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def context(self) -> int:
        """Tokens of the longest prompt of the next window."""
        self._fill()
        return max((len(job.prompt_ids) for job in self.ready), default=1)

    def push(self, conversation: Conversation) -> None:
        """Queues the next turn of `conversation` at the front."""
        if (job := self._job(conversation)) is not None:
            self.ready.appendleft(job)

    def pop(self) -> Job | None:
        """The next turn to answer, or `None` if there is currently none."""
        self._fill()
        return self.ready.popleft() if self.ready else None

    def _fill(self) -> None:
        while not self.ready and self.source:
            chunk = [self.source.pop() for _ in range(min(self.window, len(self.source)))]
            jobs = [job for job in map(self._job, chunk) if job is not None]
            self.ready.extend(sorted(jobs, key=lambda job: len(job.prompt_ids), reverse=self.downwards))
            # Alternately ascending and descending, so that neighbouring windows meet at similar lengths.
            self.downwards = not self.downwards

    def _job(self, conversation: Conversation) -> Job | None:
        """The next turn of `conversation`, or `None` if its context is too long, which is recorded."""
        ids = _encode(self.tokenizer, conversation, self.eos_ids)
        if not ids:
            raise ValueError(
                f"prompt {conversation.id!r} has no tokens; remove it or use a tokenizer with a BOS token."
            )
        if len(ids) > self.max_prompt_tokens:
            self.too_long.append((conversation.id, len(conversation.answers), len(ids)))
            self.n_turns_left_out += len(conversation.turns) - len(conversation.answers)
            return None
        return Job(conversation, ids)


__all__ = ["WINDOW_PER_SLOT", "Answered", "Conversation", "Job", "PromptQueue", "prompt_hash", "unanswered"]
