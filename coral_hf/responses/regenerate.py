"""Lets a target answer prompts, to create a drafter's training data. Fast enough for CPUs.

`generate` on a padded batch takes as long as its slowest row. Here, a fixed number of slots share one preallocated
key-value buffer, and a finished slot takes the next prompt immediately (continuous batching):

    >>> from coral_hf.responses.regenerate import iter_prompts, regenerate
    >>> stats = regenerate(target, tokenizer, iter_prompts("prompts.jsonl"), "responses.jsonl", max_new_tokens=224)
    Read ... rows of prompts.jsonl as turns: prompts without answers.

The output is append-only JSONL with one line per answered turn, so that an interrupted run can resume.
"""

import json
import os
import random
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat import check_template_kwargs, template_kwargs_of
from ..data.response_masks import eos_ids_of
from ..data.response_origin import Origin, check_same_run
from ..drafter.configuration_coral import check_vocabulary
from ..drafter.modeling_coral import CoralDraftModel
from ..generation.key_values.padded_batch import PaddedBatch, decoding_slots
from ..generation.key_values.slot_cache import SlotCache
from ..generation.slot_drafts import SlotDrafts
from .job_queue import WINDOW_PER_SLOT, Answered, Conversation, Job, PromptQueue, prompt_hash, unanswered
from .response_files import TEMPLATE_COLUMN, AnswerWriter, exclusive, iter_prompts, iter_responses, write_shards


__all__ = ["TokenSampler", "decode_all", "iter_prompts", "iter_responses", "regenerate", "write_shards"]

_READABLE = 10**9  # largest file in bytes that contains texts by default
_BYTES_PER_TOKEN = 12  # an id and its text, in JSON


def _ids_on_file(output: Path, temperature: float, origin: Origin) -> dict[str, dict[int, Answered]]:
    """Answers on file by id and turn. Rejects a file that was written at another temperature or by another target."""
    answers: dict[str, dict[int, Answered]] = {}
    if not output.exists():
        return answers
    for row in iter_responses(output):
        check_same_run(row, str(output), temperature, origin)
        kwargs = check_template_kwargs(row.get(TEMPLATE_COLUMN), f"{output}: {TEMPLATE_COLUMN}")
        found = Answered(row["response_ids"], row.get("prompt_hash"), kwargs)
        answers.setdefault(row["id"], {})[row["turn"]] = found
    return answers


class TokenSampler:
    """The next token of every row: the argmax, or a sample at `temperature` from its own generator."""

    def __init__(self, temperature: float, seed: int, device: torch.device):
        self.temperature = temperature
        self.generator = torch.Generator(device=device).manual_seed(seed) if temperature > 0 else None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            return logits.max(dim=-1).indices  # argmax, three times as fast in bfloat16 on a CPU
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[dict[str, Any]],
    output: str | os.PathLike,
    *,
    max_new_tokens: int = 512,
    max_prompt_tokens: int | None = None,
    slots: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    max_turns: int | None = None,
    exclude: Iterable[str] = (),
    text: bool | None = None,
    progress: bool = True,
    drafter: CoralDraftModel | None = None,
) -> dict[str, Any]:
    """
    Lets the target answer every prompt, turn by turn, and appends the answers to a file.

    At temperature 0, decoding is greedy: the tokens are the same as those of `generate(do_sample=False)` prompt by prompt,
    except for near-ties of the dtype. Only the EOS ids of the target's generation config are used. An existing `output` is
    continued: an incomplete last line is dropped, turns on file are not answered again, and conversations continue from
    their rows.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM with full or sliding-window attention (`sdpa` or `eager`), in evaluation mode. Targets with
            recurrent layers are decoded in padded batches, which is logged.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer. Without a chat template, the turns are used as plain text.
        prompts (`Iterable[dict]`):
            Rows `{"id", "turns"}`, optionally with a `system` text and `chat_template_kwargs`, as from [`iter_prompts`].
        output (`str` or `os.PathLike`):
            JSONL file. A row is `{"id", "turn", "prompt_ids", "response_ids"}`, with `"temperature"` if sampled, a
            `"prompt_hash"` of the texts, `"chat_template_kwargs"` if there are any, and the target: `"target"` (name),
            `"target_revision"` (commit, if it is from the Hub) and `"target_weights"` (a hash of a sample). `prompt_ids` is the
            whole context up to the generation prompt. `response_ids` ends with EOS unless the response was cut.
        max_new_tokens (`int`, defaults to 512):
            Longest response.
        max_prompt_tokens (`int`, *optional*):
            Turns with a longer context are skipped (and end their conversation), counted and reported. Default: the target's
            `max_position_embeddings` minus `max_new_tokens`.
        slots (`int`, defaults to 128):
            Rows that are decoded together.
        temperature (`float`, defaults to 0.0):
            0 for greedy, otherwise the softmax temperature of sampling.
        seed (`int`, defaults to 0):
            Seeds the order of the prompts and the sampling.
        max_turns (`int`, *optional*):
            Answer at most this many turns of each conversation; all by default.
        exclude (`Iterable[str]`, defaults to `()`):
            Ids of prompts to skip, because another file contains their answers.
        text (`bool`, *optional*):
            Write the turn and its answer as `"prompt"` and `"response"` texts next to the ids. Default: if the whole file stays
            below 1 GB.
        progress (`bool`, defaults to `True`):
            Show a progress bar with tokens per second and the time left.
        drafter ([`CoralDraftModel`], *optional*):
            Drafts for all slots if the costs measured on this machine show that it saves time, which is logged. If it does not
            pay for all slots, it may draft for the last ones. Tokens are the same; samples have the same distribution.

    Returns:
        `dict`: `n_responses`, `n_response_tokens`, `n_prompt_tokens`, `n_resumed` (answers to these prompts found on file),
        `n_excluded`, `n_too_long` and `too_long` (`(id, turn, tokens)` of skipped turns), `seconds` and `tokens_per_second`.
        With a drafter also `acceptance_length` (tokens per step and slot while drafting) and `plain_steps` (the share of
        these steps without a draft).

    Raises:
        ValueError: for settings out of range, duplicate ids, a target with layers that do not support this batching, or an
            `output` that contains other rows or those of another target, or is being written by another process.
    """
    positions = getattr(target.config.get_text_config(), "max_position_embeddings", None) or 2**20
    if max_prompt_tokens is None:
        max_prompt_tokens = max(positions - max_new_tokens, 1)
    sizes = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "slots": slots}
    if max_turns is not None:
        sizes["max_turns"] = max_turns
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if max_prompt_tokens + max_new_tokens > positions:
        raise ValueError(
            f"max_prompt_tokens={max_prompt_tokens} and max_new_tokens={max_new_tokens} exceed the {positions} "
            "positions of the target; lower one of them."
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or positive and finite, got {temperature}.")
    if target.training:
        raise ValueError("the target is in training mode, where dropout changes its answers; call target.eval().")

    output, eos_ids, excluded = Path(output), eos_ids_of(target), set(exclude)
    origin = Origin.of(target)
    cache = decoding_slots(target, slots)
    drafts = None
    if drafter is not None:
        check_vocabulary(drafter.config, tokenizer)
        if isinstance(cache, PaddedBatch):
            raise ValueError(
                f"a drafter drafts for slots of a key-value store, which does not support the recurrent layers of "
                f"{type(target).__name__}: leave the drafter out."
            )
        drafts = SlotDrafts(cache, drafter)
    with exclusive(output):
        on_file = _ids_on_file(output, temperature, origin)
        n_on_file = sum(len(answers) for answers in on_file.values())
        prompts = list(prompts)
        n_resumed = sum(len(on_file.get(row.get("id", ""), ())) for row in prompts)
        conversations, n_excluded = unanswered(prompts, on_file, excluded, max_turns, template_kwargs_of(tokenizer))
        # The seed determines the order. The draws of a resumed run differ from those already on file.
        queue = PromptQueue(
            conversations, tokenizer, eos_ids, slots * WINDOW_PER_SLOT, max_prompt_tokens, random.Random(seed)
        )
        sampler = TokenSampler(temperature, seed + 1_000_003 * n_on_file, target.device)
        common = {**({"temperature": temperature} if temperature else {}), **origin.columns}
        n_turns = sum(len(item.turns) - len(item.answers) for item in conversations)
        if text is None:
            text = n_turns * max_new_tokens * _BYTES_PER_TOKEN < _READABLE
        writer = _TurnWriter(output, queue, common, conversations, progress, tokenizer if text else None)
        try:
            decode_all(cache, queue, sampler, writer, eos_ids, max_new_tokens, drafts)
        finally:
            writer.close()
    return {
        **writer.stats(),
        **({} if drafts is None else drafts.described()),
        "n_resumed": n_resumed,
        "n_excluded": n_excluded,
        "n_too_long": len(queue.too_long),
        "too_long": queue.too_long,
    }


class _TurnWriter(AnswerWriter):
    """Writes finished turns line by line, and queues the following turns."""

    def __init__(
        self,
        output: Path,
        queue: PromptQueue,
        common: dict[str, Any],
        conversations: list[Conversation],
        progress: bool,
        texts_of: PreTrainedTokenizerBase | None,
    ):
        super().__init__(output, conversations, progress, ("n_prompt_tokens",))
        self.queue = queue
        self.common = common
        self.texts_of = texts_of

    def write(self, job: Job) -> None:
        conversation = job.conversation
        turn = len(conversation.answers)
        row: dict[str, Any] = {"id": conversation.id, "turn": turn, **self.common}
        row |= {TEMPLATE_COLUMN: conversation.template_kwargs} if conversation.template_kwargs else {}
        row["prompt_hash"] = prompt_hash(conversation.system, conversation.turns[: turn + 1])
        row |= {"prompt_ids": job.prompt_ids, "response_ids": job.response_ids}
        if self.texts_of is not None:
            row["prompt"] = conversation.turns[turn]
            row["response"] = self.texts_of.decode(job.response_ids, skip_special_tokens=True)
        self.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
        self.counts["n_prompt_tokens"] += len(job.prompt_ids)
        conversation.answers.append(job.response_ids)
        if len(conversation.answers) < len(conversation.turns):
            self.queue.push(conversation)
        self.bar.total = self.n_turns - self.queue.n_turns_left_out
        self.count_answer(len(job.response_ids))


@torch.inference_mode()
def decode_all(
    cache: SlotCache | PaddedBatch,
    queue: Any,
    sampler: TokenSampler,
    writer: Any,
    eos_ids: Collection[int],
    max_new_tokens: int,
    drafts: SlotDrafts | None = None,
) -> None:
    """The loop: fills free slots with jobs from `queue.pop`, steps all slots, and passes finished ones to `writer.write`."""
    common = queue.common_prefix()
    if drafts is not None and isinstance(cache, SlotCache):
        drafts.begin(queue.context())
        cache.share_prefix(common, drafts.states)
    else:
        cache.share_prefix(common)
    jobs: list[Job] = []  # jobs[i] is in slot i
    refill_at = cache.refill_at
    while True:
        new_jobs: list[Job] = []
        if len(jobs) <= refill_at:
            while len(jobs) + len(new_jobs) < cache.slots and (job := queue.pop()) is not None:
                new_jobs.append(job)
        drafting = drafts is not None and drafts.on
        if new_jobs:
            prompts = [job.prompt_ids for job in new_jobs]
            slots = range(len(jobs), len(jobs) + len(new_jobs))
            if drafts is not None and drafting and isinstance(cache, SlotCache):
                cache.prefill(slots, prompts, drafts.take, drafts.states)
            else:
                cache.prefill(slots, prompts)
            jobs += new_jobs
        if not jobs:
            return
        if drafts is not None and not drafting and not new_jobs and len(jobs) < cache.slots:
            drafting = drafts.begin_late([job.prompt_ids + job.response_ids for job in jobs])
        if drafts is not None and drafting:
            texts = [job.prompt_ids + job.response_ids for job in jobs]
            room = [max_new_tokens - len(job.response_ids) for job in jobs]
            found = drafts.step(texts, sampler, sampler.generator is None, room, eos_ids)
        else:
            tokens = sampler(cache.step(len(jobs)))  # [n]
            cache.append(tokens)
            found = [[token] for token in tokens.tolist()]
        for job, new in zip(jobs, found, strict=True):
            job.response_ids.extend(new)
        for slot in range(len(jobs) - 1, -1, -1):
            job = jobs[slot]
            if job.response_ids[-1] in eos_ids or len(job.response_ids) >= max_new_tokens:
                # The last live slot moves into the free one, so that live slots stay in front.
                last = jobs.pop()
                if slot < len(jobs):
                    cache.move(len(jobs), slot)
                    if drafts is not None and drafting:
                        drafts.move(len(jobs), slot)
                    jobs[slot] = last
                writer.write(job)
