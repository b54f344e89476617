"""Tokens per second of whole batches, by batch size and context, compared with plain `generate` of the same batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.prompts import Prompt, check_prompts, encode_first_turn
from ..generation.statistics import DraftStats
from ..utils.whole_files import write_json
from .benchmark import describe_run, paired_speedup
from .environment import describe_environment
from .methods import PLAIN, Method, check_drafter, draft_settings, timed


RECORD_FILE = "batches.json"


@dataclass
class BatchMeasurement:
    """The answers to one batch.

    Args:
        new_ids (`list[list[int]]`): each row's new ids, up to its end.
        seconds (`float`), prefill_seconds (`float`): the total time, and the time of an answer of one token.
        stats ([`DraftStats`], *optional*): statistics of a CORAL drafter's answers.
    """

    new_ids: list[list[int]]
    seconds: float
    prefill_seconds: float = 0.0
    stats: Any = None

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.new_ids)) / self.seconds

    @property
    def decoding_tokens_per_second(self) -> float:
        """Without each row's first token, which the prefill yields. The drafter's pass over the prompt counts here."""
        later = sum(len(row) - 1 for row in self.new_ids)
        return max(later, 1) / max(self.seconds - self.prefill_seconds, 1e-9)


def run_batches(
    target: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    output: str | Path,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int | None] = (None,),
    max_new_tokens: int = 128,
    repeats: int = 1,
) -> dict[str, Any]:
    """Answers batches of first turns with plain `generate` and every method in turn, and writes `batches.json`.

    Args:
        target (`PreTrainedModel`), tokenizer
        methods (`list[Method]`): the methods to compare with plain decoding.
        prompts (`list[Prompt]`): prompts in order. They are repeated if there are too few for a batch.
        output (`str` or `Path`): folder of the record, which is rewritten after every batch size and context and contains
            `"partial": true` until the last.
        batch_sizes (`list[int]`)
        contexts (`list[int]`): prompt lengths in tokens, to which prompts are extended by prepending other prompts; None:
            unchanged prompts.
        max_new_tokens (`int`): tokens per answer. Answers are greedy.
        repeats (`int`): number of rounds in which all methods answer a batch. The fastest run of each method counts.

    Returns:
        `dict`: the record. `runs` has a row for each method, batch size and context. `speedup` is the median ratio of tokens
        per second to plain `generate`'s over the batches, and `decoding_speedup` the same without the prefills. `identical`
        counts rows equal to plain `generate`'s. `plain_steps` counts the `steps` without a draft (a forward pass over n rows
        counts as n steps).

    Raises:
        ValueError: for sizes below 1, contexts beyond the target's positions, and methods that do not support batches.
    """
    methods = [Method(PLAIN), *methods]
    _check(target, tokenizer, methods, prompts, batch_sizes, contexts, max_new_tokens, repeats)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_batches(target, tokenizer, methods[1:], prompts, batch_sizes, contexts, max_new_tokens),
        "repeats": repeats,
        "draft_settings": {method.name: draft_settings(method) for method in methods if method.is_coral},
        "partial": True,
        "runs": [],
    }
    cells = [(context, size) for context in contexts for size in batch_sizes]
    for place, (context, size) in enumerate(tqdm(cells, desc="batches", unit="size")):
        rows = [lengthened(tokenizer, prompts, index, context) for index in range(max(len(prompts), size))]
        batches = [padded(rows[start : start + size]) for start in range(0, len(rows) - size + 1, size)]
        # a warm-up, because the first call of a size measures costs and allocates caches
        for method in methods:
            _measure(target, *batches[0], min(8, max_new_tokens), method)
        measured: dict[str, list[BatchMeasurement]] = {method.name: [] for method in methods}
        for index, batch in enumerate(batches):
            turned = methods[index % len(methods) :] + methods[: index % len(methods)]
            rounds = [{m.name: _measure(target, *batch, max_new_tokens, m) for m in turned} for _ in range(repeats)]
            for name, answers in measured.items():
                answers.append(min((one[name] for one in rounds), key=lambda answer: answer.seconds))
        length = sum(int(mask.sum()) for _, mask in batches) / (size * len(batches))
        record["runs"] += [batch_row(name, size, context, length, measured) for name in measured]
        record["partial"] = place + 1 < len(cells)
        write_json(folder / RECORD_FILE, record)
    return record


def describe_batches(
    target: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    batch_sizes: Sequence[int],
    contexts: Sequence[int | None],
    max_new_tokens: int,
) -> dict[str, Any]:
    """The record's description of the measurement. Arguments are those of [`run_batches`]."""
    described = describe_run(target, tokenizer, methods, prompts, max_new_tokens, (0.0,), 0)
    return {**described, "batch_sizes": list(batch_sizes), "contexts": list(contexts)}


def lengthened(tokenizer: Any, prompts: Sequence[Prompt], index: int, context: int | None) -> list[int]:
    """Ids of a prompt's first turn, extended to about `context` tokens with the first turns of the following prompts."""
    prompt = prompts[index % len(prompts)]
    ids = encode_first_turn(tokenizer, prompt)[0].tolist()
    missing = 0 if context is None else context - len(ids)
    if missing <= 0:
        return ids
    filler: list[int] = []
    place = index
    while len(filler) < missing:
        place += 1
        text = prompts[place % len(prompts)].turns[0]
        filler += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
    if prompt.ids is not None:
        return filler[:missing] + ids
    text = tokenizer.decode(filler[:missing]) + "\n\n" + prompt.turns[0]
    return encode_first_turn(tokenizer, replace(prompt, turns=(text,)))[0].tolist()


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their attention mask, both `[B, L]`."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _measure(
    target: Any, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, method: Method
) -> BatchMeasurement:
    _, prefill = timed(target, ids, mask, 1, method.drafter, 0.0, method.settings)
    output, seconds = timed(target, ids, mask, max_new_tokens, method.drafter, 0.0, method.settings)
    eos = target.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    new = output[:, ids.shape[1] :].tolist()
    cut = [row[: next((place for place, token in enumerate(row, 1) if token in ends), len(row))] for row in new]
    return BatchMeasurement(cut, seconds, prefill, getattr(method.drafter, "last_stats", None))


def batch_row(
    name: str, size: int, context: int | None, length: float, measured: dict[str, list[BatchMeasurement]]
) -> dict[str, Any]:
    """One row of the record, paired with plain decoding batch by batch.

    Args:
        name (`str`): name of the method.
        size (`int`), context (`int`, *optional*), length (`float`): number of rows, requested context, and mean prompt length.
        measured (`dict`): for each method, the measurements of all batches.
    """
    plain, own = measured[PLAIN], measured[name]
    tokens = sum(len(row) for answer in own for row in answer.new_ids)
    equal = [
        row == other
        for answer, before in zip(own, plain, strict=True)
        for row, other in zip(answer.new_ids, before.new_ids, strict=True)
    ]
    row = {
        "method": name,
        "batch_size": size,
        "context": context,
        "prompt_tokens": round(length, 1),
        "n_batches": len(own),
        "n_rows": len(equal),
        "new_tokens": tokens,
        "tokens_per_second": tokens / sum(answer.seconds for answer in own),
        "prefill_seconds": sum(answer.prefill_seconds for answer in own) / len(own),
        **paired_speedup([a.tokens_per_second for a in plain], [a.tokens_per_second for a in own]),
        "decoding_speedup": paired_speedup(
            [a.decoding_tokens_per_second for a in plain], [a.decoding_tokens_per_second for a in own]
        )["speedup"],
        "identical": sum(equal),
    }
    if own[0].stats is not None:
        stats = DraftStats()
        for answer in own:
            stats = stats.merge(answer.stats)
        row |= {"acceptance_length": stats.acceptance_length, "steps": stats.steps, "plain_steps": stats.plain_steps}
    return row


def _check(target, tokenizer, methods, prompts, batch_sizes, contexts, max_new_tokens, repeats) -> None:
    check_prompts(tokenizer, prompts)
    given = {"batch_size": batch_sizes, "context": [context for context in contexts if context is not None]}
    for name, values in {**given, "max_new_tokens": [max_new_tokens], "repeats": [repeats]}.items():
        for value in values:
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={list(values)}: give each value once.")
    positions = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    longest = max(given["context"], default=0) + max_new_tokens
    if positions is not None and given["context"] and longest > positions:
        raise ValueError(
            f"A context of {max(given['context'])} and {max_new_tokens} new tokens exceed the {positions} positions of the "
            "target: lower one of them."
        )
    for method in methods:
        check_drafter(target, tokenizer, method)
        single = method.name != PLAIN and (not method.is_coral or method.settings.get("draft_stock_loop"))
        if single and max(batch_sizes) > 1:
            raise ValueError(
                f"Method {method.name!r} answers one prompt at a time (Transformers' own assisted loop): leave it out, or set "
                "batch_size=1."
            )


def print_batches(record: dict[str, Any]) -> None:
    """Prints a record's rows as a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The table needs rich: pip install 'coral-hf[eval]'.") from error
    title = f"{record['target']}, {record['environment']['dtype']}, {record['environment']['device']}"
    table = Table(
        title=title,
        caption="decoding: speedup without the prefill; plain: steps without a draft; same: rows identical to plain generate",
    )
    for column in ("context", "batch", "method", "tok/s", "speedup", "decoding", "tau", "plain", "same"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in record["runs"]:
        tau, steps = row.get("acceptance_length"), row.get("steps")
        table.add_row(
            f"{row['prompt_tokens']:.0f}",
            str(row["batch_size"]),
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['decoding_speedup']:.2f}x",
            "-" if tau is None else f"{tau:.2f}",
            f"{row['plain_steps'] / steps:.0%}" if steps else "-",
            f"{row['identical']}/{row['n_rows']}",
        )
    Console().print(table)


__all__ = ["RECORD_FILE", "BatchMeasurement", "describe_batches", "print_batches", "run_batches"]
