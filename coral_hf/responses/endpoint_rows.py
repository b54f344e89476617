"""Rows of an endpoint's answers: texts of one conversation per row, or ids of one turn per row."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.chat import UnusableRow, check_template_kwargs
from ..data.conversations import encode_row_parts
from ..data.response_origin import Origin, check_same_run
from ..utils.jsonl import read_jsonl
from .job_queue import Answered, Conversation, prompt_hash
from .response_files import TEMPLATE_COLUMN, AnswerWriter


_UNUSABLE_AT_FIRST = 8  # a single unusable answer must not end a run


@dataclass
class Answer:
    """One completion: its text, finish reason, number of tokens if the server counted them, ids if requested, and the
    thinking that the server separated from the text."""

    text: str
    finish_reason: str | None
    n_tokens: int
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    reasoning: str | None = None


class EndpointWriter(AnswerWriter):
    """Writes answers line by line, from any thread."""

    def __init__(
        self,
        output: Path,
        conversations: list[Conversation],
        common: dict[str, Any],
        token_ids: bool,
        progress: bool,
        tokenizer: Any = None,
    ):
        super().__init__(output, conversations, progress, ("n_too_long", "n_empty", "n_unusable"))
        self.lock = threading.Lock()
        self.tokenizer, self.usable = tokenizer, False
        self.common, self.token_ids = common, token_ids

    def check(self, conversation: Conversation, answer: Answer) -> None:
        """Counts an answer that training cannot use. Raises `UnusableRow` if all answers are unusable."""
        if self.tokenizer is None:
            return
        new = len(conversation.answers)
        row = text_row(conversation, [*conversation.answers, answer.text], [answer], {})
        with self.lock:
            try:
                _, unusable = encode_row_parts(row, self.tokenizer, f"prompt {conversation.id!r}, turn {new}")
            except UnusableRow as error:
                unusable = [error]
            self.usable = self.usable or not unusable
            self.counts["n_unusable"] += bool(unusable)
            if unusable and not self.usable and self.counts["n_unusable"] >= _UNUSABLE_AT_FIRST:
                raise unusable[0]

    def turn(self, conversation: Conversation, answer: Answer) -> None:
        """A row with the ids of one answer."""
        turn = len(conversation.answers)
        row = {"id": conversation.id, "turn": turn, **self.common}
        row |= {TEMPLATE_COLUMN: conversation.template_kwargs} if conversation.template_kwargs else {}
        row["prompt_hash"] = prompt_hash(conversation.system, conversation.turns[: turn + 1])
        row |= {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids, "response": answer.text}
        self._write(row, [answer])

    def conversation(self, conversation: Conversation, new: list[Answer]) -> None:
        """A row of texts, of which the `new` answers are the last."""
        self._write(text_row(conversation, conversation.answers, new, self.common), new)

    def ended(self, name: str, conversation: Conversation) -> None:
        with self.lock:
            self.counts[name] += 1
            self.bar.total -= len(conversation.turns) - len(conversation.answers)

    def _write(self, row: dict[str, Any], answers: list[Answer]) -> None:
        with self.lock:
            self.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
            for answer in answers:
                self.count_answer(answer.n_tokens)


def text_row(
    conversation: Conversation, answers: list[str], new: list[Answer], common: dict[str, Any]
) -> dict[str, Any]:
    """A row of texts, of which the `new` answers are the last."""
    row: dict[str, Any] = {"id": conversation.id, **common}
    row |= {TEMPLATE_COLUMN: conversation.template_kwargs} if conversation.template_kwargs else {}
    if conversation.system is not None:
        row["system"] = conversation.system
    row |= {"turns": conversation.turns[: len(answers)], "responses": answers}
    first = len(answers) - len(new)
    if first:
        row["first_turn"] = first
    if any(answer.reasoning for answer in new):
        row["reasonings"] = [None] * first + [answer.reasoning for answer in new]
    return {**row, "finish_reasons": [None] * first + [answer.finish_reason for answer in new]}


def answers_on_file(
    output: Path, temperature: float, token_ids: bool, origin: Origin
) -> dict[str, dict[int, Answered]]:
    """Texts on file by id and turn. Rejects a file of other rows, temperatures or models."""
    answers: dict[str, dict[int, Answered]] = {}
    if not output.exists():
        return answers
    columns = ("turn", "response_ids", "response") if token_ids else ("turns", "responses")
    for number, row in read_jsonl(output):
        where = f"{output}, line {number}"
        if "id" not in row or any(column not in row for column in columns):
            raise ValueError(f"{where} is not a row of such a run ({', '.join(columns)}); give another output file.")
        check_same_run(row, where, temperature, origin)
        found = answers.setdefault(row["id"], {})
        kwargs = check_template_kwargs(row.get(TEMPLATE_COLUMN), f"{where}: {TEMPLATE_COLUMN}")
        if token_ids:
            found[row["turn"]] = Answered(row["response"], row.get("prompt_hash"), kwargs)
            continue
        for turn, text in enumerate(row["responses"]):
            found[turn] = Answered(text, prompt_hash(row.get("system"), row["turns"][: turn + 1]), kwargs)
    return answers


__all__ = ["Answer", "EndpointWriter", "answers_on_file", "text_row"]
