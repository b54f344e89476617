"""Prompts without a data set: the target writes likely user prompts, and duplicates are dropped.

A chat model continues its chat template up to the user's words. A base model continues its BOS token, and its text is later
continued as an answer. The file is append-only JSONL, so that an interrupted run can resume.
"""

import json
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat import render, tokenize
from ..data.overlap import EvaluationPrompts
from ..data.response_masks import eos_ids_of
from ..data.response_origin import Origin, check_same_run
from ..generation.key_values.padded_batch import decoding_slots
from ..utils.jsonl import read_jsonl
from .job_queue import Conversation, Job
from .prompt_quality import NearDuplicates, flaw_of, language_of
from .regenerate import TokenSampler, decode_all
from .response_files import exclusive


TEMPERATURE = 1.0
_LONGEST_PROMPT, _LONGEST_BEGINNING = 256, 48  # tokens, for a chat model and for a base model
_ATTEMPTS = 20  # attempts per prompt before giving up
_MARK = "\u2063user\u2063"


def write_self_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    output: str | os.PathLike,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    slots: int = 128,
    evaluation: EvaluationPrompts | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """
    Lets the target write prompts, and keeps those that are complete, valid and distinct.

    Args:
        target (`PreTrainedModel`), tokenizer:
            As for [`regenerate`].
        count (`int`):
            The number of prompts in the file afterwards.
        output (`str` or `os.PathLike`):
            JSONL file. A row is `{"id", "turns", "source": "self", "seed", "temperature"}` and the target. An existing file is
            continued.
        seed (`int`, defaults to 0):
            Seeds the sampling.
        max_tokens (`int`, *optional*):
            Longest prompt. A chat model's longer prompts are dropped (default: 256). A base model's end there (default: 48).
        slots (`int`, defaults to 128):
            Prompts that are written together.
        evaluation ([`EvaluationPrompts`], *optional*):
            Prompts that match these are dropped.
        progress (`bool`, defaults to `True`):
            Show a progress bar.

    Returns:
        `list[dict]`: the first `count` rows of the file.

    Raises:
        ValueError: if `count` is not positive, the target writes no valid prompt, or the file belongs to another target.
    """
    if count < 1:
        raise ValueError(f"self_prompts={count} must be at least 1.")
    output, origin = Path(output), Origin.of(target)
    with exclusive(output):
        rows = []
        for _, row in read_jsonl(output) if output.exists() else ():
            check_same_run(row, str(output), TEMPERATURE, origin)
            rows.append(row)
        if len(rows) < count:
            start, stop_ids, end = prompt_start(target, tokenizer)
            longest = max_tokens or (_LONGEST_BEGINNING if end is None else _LONGEST_PROMPT)
            common = {"source": "self", "seed": seed, "temperature": TEMPERATURE, **origin.columns}
            keeper = _Keeper(output, rows, count, tokenizer, stop_ids, end, common, evaluation, progress)
            cache = decoding_slots(target, max(1, min(slots, count)))
            try:
                queue: Any = _Starts(start, keeper, _ATTEMPTS * (count - len(rows)))
                sampler = TokenSampler(TEMPERATURE, seed + 1_000_003 * len(rows), target.device)
                decode_all(cache, queue, sampler, keeper, stop_ids, longest)
            finally:
                keeper.close()
            print(keeper.told(), flush=True)
    if not rows:
        raise ValueError(f"{origin} wrote no prompt that could be kept; give prompts with --prompts.")
    return rows[:count]


def prompt_start(target: Any, tokenizer: Any) -> tuple[list[int], frozenset[int], str | None]:
    """The ids before a user's words, the ids that end them, and the text that ends them (None: any position)."""
    eos_ids = eos_ids_of(target)
    if not getattr(tokenizer, "chat_template", None):
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(sorted(eos_ids)), None)
        if first is None:
            raise ValueError(
                "The target has neither a chat template nor a BOS or EOS token to begin with; give --prompts."
            )
        return [first], eos_ids, None
    text = render(tokenizer, [{"role": "user", "content": _MARK}], "a user's prompt")
    before, _, after = text.partition(_MARK)
    start, end = tokenize(tokenizer, before), after.strip() or None
    following = tokenizer(end or "", add_special_tokens=False)["input_ids"][:1]
    special = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}
    return start, eos_ids | frozenset(token for token in following if token in special), end


class _Starts:
    """Returns the same beginning until enough prompts are kept, or too many were dropped."""

    def __init__(self, start: list[int], keeper: "_Keeper", attempts: int):
        self.start, self.keeper, self.most, self.n_given = start, keeper, attempts, 0

    def common_prefix(self) -> list[int]:
        return self.start[:-1]

    def pop(self) -> Job | None:
        # at most as many as are missing, so that no running prompt is discarded
        under_way = self.n_given - self.keeper.n_judged
        if self.n_given >= self.most or under_way >= self.keeper.count - len(self.keeper.rows):
            return None
        self.n_given += 1
        return Job(Conversation("self", []), list(self.start))


class _Keeper:
    """Checks finished prompts, and appends those that are kept to the file and to `rows`."""

    def __init__(
        self,
        output: Path,
        rows: list[dict[str, Any]],
        count: int,
        tokenizer: Any,
        stop_ids: Collection[int],
        end: str | None,
        common: dict[str, Any],
        evaluation: EvaluationPrompts | None,
        progress: bool,
    ):
        self.file, self.rows, self.count = output.open("a", encoding="utf-8"), rows, count
        self.tokenizer, self.stop_ids, self.end, self.common, self.evaluation = (
            tokenizer,
            stop_ids,
            end,
            common,
            evaluation,
        )
        self.known = NearDuplicates()
        for row in rows:
            self.known.add(row["turns"][0])
        self.dropped: Counter[str] = Counter()
        self.n_judged = 0
        self.lengths: list[int] = []
        self.bar = tqdm(total=count, initial=len(rows), unit="prompt", desc="self-prompts", disable=not progress)

    def write(self, job: Job) -> None:
        self.n_judged += 1
        text, why = self._judge(job.response_ids)
        if why is not None:
            self.dropped[why] += 1
            return
        self.known.add(text)
        row = {"id": f"self-{self.common['seed']}-{len(self.rows)}", "turns": [text], **self.common}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        self.rows.append(row)
        self.lengths.append(len(job.response_ids))
        self.bar.update()

    def _judge(self, ids: list[int]) -> tuple[str, str | None]:
        """The text of a prompt, and the reason for dropping it."""
        ended = ids[-1] in self.stop_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        if self.end:
            text, found, _ = text.partition(self.end)
            ended = ended or bool(found)
        text = text.strip()
        if self.end is not None and not ended:
            return text, "cut"
        if why := flaw_of(text, self.tokenizer.all_special_tokens):
            return text, why
        if self.evaluation is not None and self.evaluation.kind_of(text) is not None:
            return text, "in an evaluation file"
        return text, "duplicate" if text in self.known else None

    def told(self) -> str:
        """A summary of kept and dropped prompts, in two lines."""
        reasons = ", ".join(f"{number:,} {why}" for why, number in self.dropped.most_common()) or "none"
        languages = Counter(language_of(row["turns"][0]) for row in self.rows)
        shares = ", ".join(f"{name} {number / len(self.rows):.0%}" for name, number in languages.most_common(5))
        lengths = sorted(self.lengths) or [0]
        short, middle, long = (lengths[int(share * (len(lengths) - 1))] for share in (0.1, 0.5, 0.9))
        return (
            f"Self-made prompts: {len(self.rows):,} of {self.count:,} kept; dropped: {reasons}.\n"
            f"Their languages: {shares or 'none'}; tokens: 10 % up to {short}, half up to {middle}, 90 % up to {long}."
        )

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def self_prompts_path(output: str | os.PathLike) -> Path:
    """The file with the prompts to the answers in `output`."""
    path = Path(output)
    return path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.prompts.jsonl")


__all__ = ["prompt_start", "self_prompts_path", "write_self_prompts"]
