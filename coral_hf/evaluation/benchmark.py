"""One benchmark run: plain `generate` and any number of methods, interleaved prompt by prompt."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..generation.statistics import DraftStats
from .environment import describe_environment
from .methods import Measurement, Method, describe_drafter, draft_settings, measure
from .prompts import Prompt, encode_context


def result_row(method: str, name: str, plain: list[Measurement], measured: list[Measurement]) -> dict[str, Any]:
    """One row of the record: a method on one benchmark, paired with plain decoding prompt by prompt."""
    ratios = [c.tokens_per_second / p.tokens_per_second for p, c in zip(plain, measured, strict=True)]
    row = {
        "method": method,
        "benchmark": name,
        "temperature": 0.0,
        "n_prompts": len(measured),
        "new_tokens": _tokens(measured),
        "tokens_per_second": _speed(measured),
        # the median over prompts is robust against a neighbour's burst; the spread says how much there was
        "speedup": statistics.median(ratios),
        "speedup_quartiles": _quartiles(ratios),
        "acceptance_length": 1.0 if method == "plain" else None,
        "identical": sum(p.new_ids == c.new_ids for p, c in zip(plain, measured, strict=True)),
    }
    if measured[0].stats is not None:
        stats = DraftStats()
        for measurement in measured:
            stats = stats.merge(measurement.stats)
        row["acceptance_length"] = stats.acceptance_length
        row["acceptance_per_depth"] = stats.acceptance_per_depth
        row["steps"] = stats.steps
    return row


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
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    output: str | Path,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Answers every prompt with plain `generate` and with every method, and writes `benchmark.json`.

    All methods answer a prompt before any answers the next, the order turning from prompt to prompt, so that a drift of
    the machine hits all alike. Later turns follow on plain's answers. The record is rewritten after every prompt and
    says `"partial": true` until the last.

    Args:
        target (`PreTrainedModel`), tokenizer
        methods (`list[Method]`): what is compared with plain decoding.
        prompts (`list[Prompt]`): see [`read_prompts`].
        output (`str` or `Path`): folder of the record.
        max_new_tokens (`int`): per turn.

    Returns:
        `dict`: the record, with `environment`, `methods`, `partial` and `runs` (one row per method and benchmark;
        `identical` counts equal outputs, `speedup` is the median of the paired ratios of tokens per second).

    Raises:
        ValueError: if two methods have the same name.
    """
    methods = [Method("plain"), *methods]
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"The methods are named {names}: give each a name of its own.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    warm_up = encode_context(tokenizer, prompts[0].turns[:1])
    for method in methods:
        measure(target, warm_up, min(16, max_new_tokens), method.drafter, **method.settings)
    record: dict[str, Any] = {
        "environment": describe_environment(target.device, target.dtype),
        "target": target.config._name_or_path,
        **describe_drafter(next((m.drafter for m in methods if m.drafter is not None), None)),
        "max_new_tokens": max_new_tokens,
        "methods": {method.name: method.settings for method in methods[1:]},
        "draft_settings": {method.name: draft_settings(method) for method in methods if method.drafter is not None},
        "partial": True,
        "runs": [],
    }
    # benchmark -> method -> measurements, in the order of the prompts
    results: dict[str, dict[str, list[Measurement]]] = {}
    for index, prompt in enumerate(tqdm(prompts, desc="benchmark", unit="prompt")):
        responses: list[str] = []
        for turn in range(len(prompt.turns)):
            ids = encode_context(tokenizer, prompt.turns[: turn + 1], responses)
            first = index % len(methods)
            measured = {
                method.name: measure(target, ids, max_new_tokens, method.drafter, **method.settings)
                for method in methods[first:] + methods[:first]
            }
            by_method = results.setdefault(prompt.benchmark, {name: [] for name in names})
            for name in names:
                by_method[name].append(measured[name])
            responses.append(tokenizer.decode(measured["plain"].new_ids, skip_special_tokens=True))
        _write(folder, record, results, partial=True)
    return _write(folder, record, results, partial=False)


def _write(folder: Path, record: dict[str, Any], results: dict[str, dict], partial: bool) -> dict[str, Any]:
    names = list(next(iter(results.values())))
    overall = {name: [m for result in results.values() for m in result[name]] for name in names}
    rows = [
        result_row(name, benchmark, result["plain"], result[name])
        for benchmark, result in [*results.items(), ("all", overall)]
        for name in names
    ]
    record = {**record, "partial": partial, "runs": rows}
    part = folder / "benchmark.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, folder / "benchmark.json")
    return record


def print_table(record: dict[str, Any]) -> None:
    """Prints a record's rows as a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The table needs rich: pip install 'coral-hf[eval]'.") from error
    table = Table(title=f"{record['target']}, {record['environment']['dtype']}, {record['environment']['device']}")
    for column in ("benchmark", "method", "prompts", "tok/s", "speedup", "tau", "identical"):
        table.add_column(column, justify="left" if column in ("benchmark", "method") else "right")
    for row in record["runs"]:
        tau = row["acceptance_length"]
        table.add_row(
            row["benchmark"],
            row["method"],
            str(row["n_prompts"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
            "-" if tau is None else f"{tau:.2f}",
            f"{row['identical']}/{row['n_prompts']}",
        )
    Console().print(table)


__all__ = ["print_table", "run_benchmark"]
