"""The turns that a target has yet to answer, in an order that batches well."""

from collections import deque
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase


# Prompts are sorted by length inside windows of this many per slot: rows that are live together are of similar length,
# so attention, which pays for the longest, wastes little, while the order over the whole file stays random.
WINDOW_PER_SLOT = 8


@dataclass
class Conversation:
    """One prompt row and the target's answers so far (as ids)."""

    id: str
    turns: list[str]
    answers: list[list[int]] = field(default_factory=list)


@dataclass
class Job:
    """One turn that is being answered."""

    conversation: Conversation
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)


def _encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, eos_ids: set[int]) -> list[int]:
    """Ids of the conversation so far, up to the point where the next answer begins."""
    texts = []
    for answer in conversation.answers:
        ids = answer[:-1] if answer and answer[-1] in eos_ids else answer
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    turns = conversation.turns[: len(texts) + 1]
    if tokenizer.chat_template is None:
        # A base model: turns and answers one after the other, as plain text.
        parts = [part for index, turn in enumerate(turns) for part in [turn, *texts[index : index + 1]]]
        return list(tokenizer("\n\n".join(parts))["input_ids"])
    messages: list[dict[str, str]] = []
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if index < len(texts):
            messages.append({"role": "assistant", "content": texts[index]})
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


class PromptQueue:
    """
    The prompts still to be answered, tokenized ahead of need and sorted by length inside a window. The next turn of a
    conversation goes to the front: its answer is wanted before new conversations begin.
    """

    def __init__(self, conversations, tokenizer, eos_ids, window, max_prompt_tokens, rng):
        self.source = list(conversations)
        rng.shuffle(self.source)
        self.source.reverse()  # popped from the end
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.window, self.max_prompt_tokens = window, max_prompt_tokens
        self.ready: deque[Job] = deque()
        self.too_long: list[tuple[str, int, int]] = []
        self.n_turns_left_out = 0
        self.downwards = False

    def push(self, conversation: Conversation) -> None:
        """Queues the next turn of `conversation` at the front."""
        if (job := self._job(conversation)) is not None:
            self.ready.appendleft(job)

    def pop(self) -> Job | None:
        """The next turn to answer, `None` if there is none for now."""
        while not self.ready and self.source:
            chunk = [self.source.pop() for _ in range(min(self.window, len(self.source)))]
            jobs = [job for job in map(self._job, chunk) if job is not None]
            self.ready.extend(sorted(jobs, key=lambda job: len(job.prompt_ids), reverse=self.downwards))
            # Up and down in turns, so that neighbouring windows meet at similar lengths.
            self.downwards = not self.downwards
        return self.ready.popleft() if self.ready else None

    def _job(self, conversation: Conversation) -> Job | None:
        """The next turn of `conversation`, `None` (and noted) if its context is too long."""
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


__all__ = ["WINDOW_PER_SLOT", "Conversation", "Job", "PromptQueue"]
