"""Regeneration by a serving engine: any server with OpenAI's chat completions (vLLM, SGLang, TGI) answers the prompts.

This is for targets that are too large for one machine. The engine distributes and batches. This module keeps many requests
open, and writes a file from which a later run can resume.

    >>> from coral_hf.responses.endpoint import regenerate_from_endpoint
    >>> from coral_hf.responses.response_files import iter_prompts
    >>> prompts = iter_prompts("prompts.jsonl")
    >>> stats = regenerate_from_endpoint("http://host:8000/v1", "your/model", prompts, "responses.jsonl")
    Read ... rows of prompts.jsonl as turns: prompts without answers.
"""

import http.client
import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ..data.chat import build_messages
from ..data.response_origin import Origin
from .endpoint_rows import Answer, EndpointWriter, answers_on_file
from .job_queue import Conversation, unanswered
from .response_files import exclusive


_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0
_TOO_LONG = re.compile(r"context|too (long|large|many tokens)|maximum.*length", re.IGNORECASE)


class PromptTooLong(Exception):
    """Raised if the server rejects a conversation because of its length."""


class Stopped(Exception):
    """Raised in other threads after a request has failed permanently."""


class ChatEndpoint:
    """Chat completions of an OpenAI-compatible server. Requests are repeated with growing pauses if that may help.

    `OPENAI_API_KEY`, if set, is sent as the bearer token.

    Args:
        url (`str`): the URL up to and including `/v1`.
        model (`str`): the server's name for the target.
        token_ids (`bool`): request token ids (`return_token_ids` of vLLM).
        attempts (`int`): attempts per request; pause (`float`): seconds before the second one, doubled each time.
        timeout (`float`): time limit for one answer, in seconds.
    """

    def __init__(
        self,
        url: str,
        model: str,
        token_ids: bool = False,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 600.0,
    ):
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"endpoint {url!r} must be a URL such as http://host:8000/v1.")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}.")
        self.url, self.model, self.token_ids = url.rstrip("/") + "/chat/completions", model, token_ids
        self.attempts, self.pause, self.timeout = attempts, pause, timeout
        self.stopped = threading.Event()

    def complete(self, messages: list[dict[str, str]], **settings: Any) -> Answer:
        """Returns the answer to messages.

        Raises:
            ValueError: if the server rejects the request, or does not return a chat completion.
            ConnectionError: if it does not answer in any attempt.
            PromptTooLong: if the conversation is too long for it.
        """
        body = {"model": self.model, "messages": messages, **settings}
        if self.token_ids:
            body["return_token_ids"] = True
        reason, asked_pause = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                pause = min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                if self.stopped.wait(max(pause, asked_pause)):
                    raise Stopped
                asked_pause = 0.0
            try:
                return self._answer(self._post(body))
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")
                if error.code in (400, 413, 422) and _TOO_LONG.search(text):
                    raise PromptTooLong(text) from error
                reason = f"HTTP {error.code}: {_one_line(text)}"
                if error.code not in _RETRIED:
                    raise ValueError(f"{self.url} rejected a request for model {self.model!r} ({reason}).") from error
                asked_pause = _seconds(error.headers.get("Retry-After"))
            except (
                OSError,
                http.client.HTTPException,
                json.JSONDecodeError,
            ) as error:  # unreachable, cut off, too slow
                reason = str(error) or type(error).__name__
        raise ConnectionError(f"{self.url} gave no answer in {self.attempts} attempts ({reason})")

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def _answer(self, body: Any) -> Answer:
        try:
            choice = body["choices"][0]
            message, count = choice["message"], (body.get("usage") or {}).get("completion_tokens") or 0
            text, reasoning = message["content"] or "", message.get("reasoning_content") or message.get("reasoning")
            finish_reason, ids = choice.get("finish_reason"), choice.get("token_ids")
            prompt_ids = body.get("prompt_token_ids")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.url} did not return a chat completion, but {_one_line(json.dumps(body))}: give the address of an "
                "OpenAI-compatible server, such as http://host:8000/v1."
            ) from error
        if self.token_ids and not (ids and prompt_ids):
            raise ValueError(
                f"{self.url} returned no token ids (vLLM does, for return_token_ids): leave --endpoint_token_ids out and "
                "keep texts."
            )
        return Answer(text, finish_reason, count or len(ids or ()), prompt_ids, ids, reasoning)


def regenerate_from_endpoint(
    url: str,
    model: str,
    prompts: Iterable[dict[str, Any]],
    output: str | os.PathLike,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    concurrency: int = 64,
    token_ids: bool = False,
    max_turns: int | None = None,
    exclude: Iterable[str] = (),
    attempts: int = 6,
    pause: float = 1.0,
    progress: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """
    Lets a server answer every prompt, turn by turn, and appends the answers to a file.

    Texts are stored as one conversation per row: `{"id", "target", "turns", "responses", "finish_reasons"}`, where `target` is
    the model. Rows also contain `system`, `temperature` and `chat_template_kwargs` if set, and `reasonings` if the server
    returns them separately. Training tokenises the texts, and learns no end from a response that was cut ("length"). With
    `token_ids`, a row is one turn in the format of [`regenerate`], with its text. An existing `output` is continued. A row of
    texts that continues a conversation contains its `first_turn`; earlier answers are in an earlier row and only context.

    Args:
        url (`str`), model (`str`), attempts (`int`), pause (`float`): see [`ChatEndpoint`].
        prompts (`Iterable[dict]`): rows `{"id", "turns"}`, optionally with a `system` text, as from [`iter_prompts`].
        output (`str` or `os.PathLike`): JSONL file.
        max_new_tokens (`int`), temperature (`float`), seed (`int`): sent with every request.
        concurrency (`int`): number of simultaneous requests.
        token_ids (`bool`): keep the token ids that the server returns.
        max_turns (`int`, *optional*), exclude (`Iterable[str]`), progress (`bool`): as for [`regenerate`].
        template_kwargs (`dict`, *optional*): variables of the chat template, sent as `chat_template_kwargs` (vLLM, SGLang).
            A row's own variables take precedence.
        tokenizer (*optional*): the target's. With it, each text is checked for training. Unusable texts are counted, and
            the run stops if all texts are unusable.

    Returns:
        `dict`: `n_responses`, `n_response_tokens` (as counted by the server), `n_resumed` (turns found on file), `n_excluded`,
        `n_too_long`, `n_empty` (conversations that ended early), `n_unusable` (answers that training skips), `seconds`,
        `tokens_per_second`.

    Raises:
        ValueError: for settings out of range, duplicate ids, a rejected request, answers that cannot be trained on, or an
            `output` that contains other rows or is being written by another process.
        ConnectionError: if the server stops answering. Earlier answers are on file.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "concurrency": concurrency}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or positive and finite, got {temperature}.")
    endpoint, output = ChatEndpoint(url, model, token_ids, attempts, pause), Path(output)
    settings = {"max_tokens": max_new_tokens, "temperature": temperature}
    if temperature > 0:
        settings["seed"] = seed
    origin = Origin(model)
    with exclusive(output):
        on_file = answers_on_file(output, temperature, token_ids, origin)
        conversations, n_excluded = unanswered(prompts, on_file, set(exclude), max_turns, template_kwargs)
        common = {**({"temperature": temperature} if temperature else {}), **origin.columns}
        writer = EndpointWriter(output, conversations, common, token_ids, progress, tokenizer)
        pool = ThreadPoolExecutor(concurrency)
        futures: list[Future] = []
        try:
            futures += [pool.submit(_converse, endpoint, item, settings, writer) for item in conversations]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            endpoint.stopped.set()
            pool.shutdown(cancel_futures=True)  # waits until running conversations have written their answers
            writer.close()
    errors = [error for item in futures if not item.cancelled() and (error := item.exception()) is not None]
    if errors:
        error = next((error for error in errors if not isinstance(error, Stopped)), errors[0])
        if not isinstance(error, ConnectionError):
            raise error
        raise ConnectionError(
            f"{error}. {writer.counts['n_responses']} new answers are in {output}: start the server and run the same "
            "command again to resume."
        ) from error
    return {**writer.stats(), "n_resumed": sum(map(len, on_file.values())), "n_excluded": n_excluded}


def _converse(
    endpoint: ChatEndpoint, conversation: Conversation, settings: dict[str, Any], writer: EndpointWriter
) -> None:
    """Answers the turns of a conversation that are not on file."""
    new: list[Answer] = []
    try:
        while len(conversation.answers) < len(conversation.turns):
            if endpoint.stopped.is_set():
                raise Stopped
            turns = conversation.turns[: len(conversation.answers) + 1]
            messages = build_messages(turns, conversation.answers, conversation.system)
            asked = {"chat_template_kwargs": kwargs} if (kwargs := conversation.template_kwargs) else {}
            try:
                answer = endpoint.complete(messages, **settings, **asked)
            except PromptTooLong:
                writer.ended("n_too_long", conversation)
                break
            if not answer.text:
                writer.ended("n_empty", conversation)
                break
            if writer.token_ids:
                writer.turn(conversation, answer)
            else:
                writer.check(conversation, answer)
            conversation.answers.append(answer.text)
            new.append(answer)
    finally:  # also if this or another request failed in between
        if new and not writer.token_ids:
            writer.conversation(conversation, new)


def _seconds(text: str | None) -> float:
    """A Retry-After header in seconds; 0 for none, or a date."""
    return min(float(text), 10 * _LONGEST_PAUSE) if text and text.strip().isdigit() else 0.0


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


__all__ = ["ChatEndpoint", "regenerate_from_endpoint"]
