"""One benchmark run: plain `generate` and CORAL, interleaved prompt by prompt."""

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..generation.statistics import DraftStats
from .environment import describe_environment
from .prompts import Prompt, encode_context


@dataclass
class Measurement:
    """One answer: its new ids, how long it took and, for a drafter, what it accepted."""

    new_ids: list[int]
    seconds: float
    stats: DraftStats | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.new_ids) / self.seconds


def measure(target: Any, ids: torch.Tensor, max_new_tokens: int, drafter: Any = None, **settings: Any) -> Measurement:
    """Times one greedy `generate` call on ids `[1, L]`, with a drafter if one is given."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    config.eos_token_id = target.generation_config.eos_token_id
    config.pad_token_id = target.generation_config.pad_token_id
    for name, value in settings.items():
        setattr(config, name, value)
    ids = ids.to(target.device)
    extra = {} if drafter is None else {"assistant_model": drafter}
    _synchronize(target.device)
    start = time.perf_counter()
    output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra)
    _synchronize(target.device)
    seconds = time.perf_counter() - start
    return Measurement(output[0, ids.shape[1] :].tolist(), seconds, getattr(drafter, "last_stats", None))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class _Results:
    """Paired measurements of one benchmark."""

    plain: list[Measurement] = field(default_factory=list)
    coral: list[Measurement] = field(default_factory=list)

    def rows(self, name: str) -> list[dict[str, Any]]:
        plain_speed, coral_speed = _speed(self.plain), _speed(self.coral)
        ratios = [c.tokens_per_second / p.tokens_per_second for p, c in zip(self.plain, self.coral, strict=True)]
        stats = DraftStats()
        for measurement in self.coral:
            stats = stats.merge(measurement.stats)
        pairs = list(zip(self.plain, self.coral, strict=True))
        return [
            {"method": "plain", "benchmark": name, "temperature": 0.0, "n_prompts": len(self.plain)}
            | {"new_tokens": _tokens(self.plain), "tokens_per_second": plain_speed, "speedup": 1.0}
            | {"acceptance_length": 1.0, "identical": len(self.plain)},
            {"method": "coral", "benchmark": name, "temperature": 0.0, "n_prompts": len(self.coral)}
            | {"new_tokens": _tokens(self.coral), "tokens_per_second": coral_speed}
            # the median over prompts is robust against a neighbour's burst; the spread says how much there was
            | {"speedup": statistics.median(ratios), "speedup_quartiles": _quartiles(ratios)}
            | {"acceptance_length": stats.acceptance_length, "acceptance_per_depth": stats.acceptance_per_depth}
            | {"steps": stats.steps, "identical": sum(p.new_ids == c.new_ids for p, c in pairs)},
        ]


def _tokens(measurements: list[Measurement]) -> int:
    return sum(len(measurement.new_ids) for measurement in measurements)


def _speed(measurements: list[Measurement]) -> float:
    return _tokens(measurements) / sum(measurement.seconds for measurement in measurements)


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    quartiles = statistics.quantiles(values, n=4)
    return [quartiles[0], quartiles[2]]


def run_benchmark(
    target: Any,
    tokenizer: Any,
    drafter: Any,
    prompts: Sequence[Prompt],
    output: str | Path,
    max_new_tokens: int = 128,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers every prompt twice, plain and with the drafter, and writes `benchmark.json`.

    Both methods answer a prompt before either answers the next, the order changing from prompt to prompt, so that a
    drift of the machine hits both alike. Later turns follow on plain's answers. The record is rewritten after every
    prompt and says `"partial": true` until the last.

    Args:
        target (`PreTrainedModel`), tokenizer, drafter ([`CoralDraftModel`])
        prompts (`list[Prompt]`): see [`read_prompts`].
        output (`str` or `Path`): folder of the record.
        max_new_tokens (`int`): per turn.
        settings (`dict`, *optional*): [`DraftSettings`] to override.

    Returns:
        `dict`: the record, with `environment`, `settings`, `partial` and `runs` (one row per method and benchmark;
        `identical` counts equal outputs, `speedup` is the median of the paired ratios of tokens per second).
    """
    settings = settings or {}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    warm_up = encode_context(tokenizer, prompts[0].turns[:1])
    for assistant in (None, drafter):
        measure(target, warm_up, min(16, max_new_tokens), assistant, **(settings if assistant is not None else {}))
    record: dict[str, Any] = {
        "environment": describe_environment(target.device, target.dtype),
        "target": target.config._name_or_path,
        "drafter": drafter.config._name_or_path,
        "max_new_tokens": max_new_tokens,
        "settings": settings,
        "partial": True,
        "runs": [],
    }
    results: dict[str, _Results] = {}
    for index, prompt in enumerate(tqdm(prompts, desc="benchmark", unit="prompt")):
        responses: list[str] = []
        for turn in range(len(prompt.turns)):
            ids = encode_context(tokenizer, prompt.turns[: turn + 1], responses)
            measured = {}
            for assistant in (None, drafter) if index % 2 == 0 else (drafter, None):
                extra = {} if assistant is None else settings
                measured[assistant is not None] = measure(target, ids, max_new_tokens, assistant, **extra)
            results.setdefault(prompt.benchmark, _Results())
            results[prompt.benchmark].plain.append(measured[False])
            results[prompt.benchmark].coral.append(measured[True])
            responses.append(tokenizer.decode(measured[False].new_ids, skip_special_tokens=True))
        _write(folder, record, results, partial=True)
    return _write(folder, record, results, partial=False)


def _write(folder: Path, record: dict[str, Any], results: dict[str, _Results], partial: bool) -> dict[str, Any]:
    overall = _Results()
    for result in results.values():
        overall.plain += result.plain
        overall.coral += result.coral
    rows = [row for name, result in results.items() for row in result.rows(name)]
    record = {**record, "partial": partial, "runs": rows + overall.rows("all")}
    part = folder / "benchmark.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, folder / "benchmark.json")
    return record


def print_table(record: dict[str, Any]) -> None:
    """Prints a record's CORAL rows as a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The table needs rich: pip install 'coral-hf[eval]'.") from error
    table = Table(title=f"{record['target']}, {record['environment']['dtype']}, {record['environment']['device']}")
    for column in ("benchmark", "prompts", "plain tok/s", "CORAL tok/s", "speedup", "tau", "identical"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    plain = {row["benchmark"]: row for row in record["runs"] if row["method"] == "plain"}
    for row in record["runs"]:
        if row["method"] != "plain":
            table.add_row(
                row["benchmark"],
                str(row["n_prompts"]),
                f"{plain[row['benchmark']]['tokens_per_second']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['acceptance_length']:.2f}",
                f"{row['identical']}/{row['n_prompts']}",
            )
    Console().print(table)


__all__ = ["Measurement", "measure", "print_table", "run_benchmark"]
