"""One benchmark run: plain `generate` and any number of methods, interleaved prompt by prompt."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.prompts import Prompt, answer_turns, check_prompts, describe_prompts, encode_first_turn
from ..generation.statistics import DraftStats
from ..utils.whole_files import write_json
from .compiling import compiles, longest_text
from .environment import describe_environment, describe_methods, describe_rendering, describe_target
from .methods import (
    EXACT_DTYPES,
    PLAIN,
    Measurement,
    Method,
    check_drafter,
    check_temperatures,
    draft_settings,
    first_difference,
    measure,
)
from .server_counts import count_as_server


# (benchmark, temperature) -> method -> measurements in the order of the prompts
Results = dict[tuple[str, float], dict[str, list[Measurement]]]


def paired_speedup(plain: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios of tokens per second, answer by answer.

    The median over answers is robust against load by other processes. The quartiles show the spread.
    """
    ratios = [after / before for before, after in zip(plain, other, strict=True)]
    # inclusive, because the exclusive method extrapolates beyond the data for few prompts
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"speedup": statistics.median(ratios), "speedup_quartiles": [quartiles[0], quartiles[2]]}


def result_row(
    method: Method, benchmark: str, temperature: float, plain: list[Measurement], measured: list[Measurement]
) -> dict[str, Any]:
    """One row of the record: a method on one benchmark, compared with plain decoding answer by answer."""
    comparable = temperature == 0 or method.samples_like_plain
    places = [first_difference(p.new_ids, m.new_ids) for p, m in zip(plain, measured, strict=True)]
    tokens = sum(len(measurement.new_ids) for measurement in measured)
    row = {
        "method": method.name,
        "benchmark": benchmark,
        "temperature": temperature,
        "n_prompts": len({measurement.prompt for measurement in measured}),
        "n_turns": len(measured),
        "new_tokens": tokens,
        "tokens_per_second": tokens / sum(measurement.seconds for measurement in measured),
        **paired_speedup([p.tokens_per_second for p in plain], [m.tokens_per_second for m in measured]),
        "acceptance_length": 1.0 if method.is_plain else None,
        # Transformers' own loops draw different samples by design, so there is nothing to compare
        "identical": places.count(None) if comparable else None,
        "first_divergences": sorted(place for place in places if place is not None) if comparable else None,
    }
    if measured[0].stats is not None:
        stats = DraftStats()
        for measurement in measured:
            stats = stats.merge(measurement.stats)
        row["acceptance_length"] = stats.acceptance_length
        row["acceptance_per_depth"] = stats.acceptance_per_depth
        row["reached_per_depth"] = stats.reached_per_depth
        row["steps"] = stats.steps
    served = [measurement.served for measurement in measured if measurement.served is not None]
    if served:
        steps, accepted = (sum(counts) for counts in zip(*served, strict=True))
        row["server_acceptance_length"] = 1.0 + accepted / steps if steps else 1.0
    return row


def run_benchmark(
    target: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    output: str | Path,
    max_new_tokens: int = 128,
    temperatures: Sequence[float] = (0.0,),
    seed: int = 0,
    repeats: int = 1,
    server_tau: bool = False,
) -> dict[str, Any]:
    """Answers every prompt with plain `generate` and with every method, and writes `benchmark.json`.

    All methods answer a prompt before the next prompt is answered, in an order that rotates from prompt to prompt. A drift
    of the machine then affects all of them equally. Later turns continue plain `generate`'s answers. The record is rewritten
    after every prompt and contains `"partial": true` until the last, so that an interrupted run keeps its measurements.

    Args:
        target (`PreTrainedModel`), tokenizer
        methods (`list[Method]`): the methods to compare with plain decoding.
        prompts (`list[Prompt]`): see [`read_prompts`].
        output (`str` or `Path`): folder of the record.
        max_new_tokens (`int`): tokens per turn.
        temperatures (`list[float]`): 0 is greedy. Above 0, all methods sample with the same seed.
        seed (`int`): seed of the first prompt's samples. Each further prompt adds one.
        repeats (`int`): number of rounds in which all methods answer a prompt. The fastest run of each method counts, because
            other processes disturbed it least.
        server_tau (`bool`): also count greedy answers of CORAL drafters as vLLM does (`server_acceptance_length`). This needs
            one more answer per prompt, which is not timed.

    Returns:
        `dict`: the record, with `environment`, `methods`, `drafters`, `compile_seconds` (time of compiling, not included in
        other times), `partial` and `runs`: one row per method, benchmark and temperature. `n_prompts` counts conversations
        and `n_turns` answers, one per turn. `speedup` is the median of the answers' paired ratios of tokens per second.
        `identical` counts answers equal to plain `generate`'s (None if a sampling method draws other samples by design).
        `first_divergences` contains the position of the first different token of the other answers (in bf16, near-ties may
        differ).

    Raises:
        ValueError: if two methods have the same name, there are no prompts, a temperature is negative, not finite or
            repeated, or a drafter belongs to another target.
    """
    methods, prompts, temperatures = [Method(PLAIN), *methods], list(prompts), [float(t) for t in temperatures]
    _check(target, tokenizer, methods, prompts, max_new_tokens, temperatures)
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1.")
    warm_up = encode_first_turn(tokenizer, prompts[0])
    store = {
        "max_cache_len": longest_text(
            tokenizer,
            prompts,
            max_new_tokens,
            getattr(target.config.get_text_config(), "max_position_embeddings", None),
        )
    }
    shared = {method.name: store if compiles(method.settings) else {} for method in methods}
    compiling = {method.name: 0.0 for method in methods if compiles(method.settings)}
    for method in methods:
        for temperature in temperatures:
            how = {"temperature": temperature, **method.settings, **shared[method.name]}
            warm = measure(target, warm_up, min(16, max_new_tokens), method.drafter, **how)
            if method.name in compiling:
                compiling[method.name] += warm.compile_seconds
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_run(target, tokenizer, methods[1:], prompts, max_new_tokens, temperatures, seed),
        "repeats": repeats,
        "draft_settings": {method.name: draft_settings(method) for method in methods if method.is_coral},
        **({"compile_seconds": compiling} if compiling else {}),
        "partial": True,
        "runs": [],
    }
    results: Results = {}
    for index, prompt in enumerate(tqdm(prompts, desc="benchmark", unit="prompt")):
        first = index % len(methods)
        turned = methods[first:] + methods[:first]
        for temperature in temperatures:
            by_method = results.setdefault((prompt.benchmark, temperature), {method.name: [] for method in methods})
            how = {"temperature": temperature, "seed": seed + index}
            answer = partial(
                _measure_all, target, turned, by_method, max_new_tokens, repeats, index, how, shared, compiling
            )
            if server_tau and temperature == 0:
                answer = partial(_count_as_server, answer, target, methods, by_method, max_new_tokens)
            answer_turns(tokenizer, prompt, answer)
        record = _write(folder, record, methods, results, partial=True)
    return _write(folder, record, methods, results, partial=False)


def describe_run(
    target: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperatures: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """The record's description of a benchmark. Arguments are those of [`run_benchmark`]."""
    return {
        **describe_target(target),
        **describe_rendering(tokenizer),
        **describe_methods(methods),
        **describe_prompts(prompts),
        "max_new_tokens": max_new_tokens,
        "temperatures": [float(temperature) for temperature in temperatures],
        "seed": seed,
    }


def _measure_all(
    target: Any,
    methods: list[Method],
    results: dict[str, list[Measurement]],
    max_new_tokens: int,
    repeats: int,
    prompt: int,
    how: dict[str, Any],
    shared: dict[str, dict[str, Any]],
    compiling: dict[str, float],
    ids: torch.Tensor,
) -> list[int]:
    """Adds every method's fastest answer to a turn of the `prompt`-th conversation to its results. Returns plain `generate`'s.

    The time of compiling is added to `compiling`.
    """
    rounds = [
        {
            method.name: measure(
                target, ids, max_new_tokens, method.drafter, **how, **method.settings, **shared[method.name]
            )
            for method in methods
        }
        for _ in range(repeats)
    ]
    for name in compiling:
        compiling[name] += sum(one[name].compile_seconds for one in rounds)
    for name, measurements in results.items():
        fastest = min((one[name] for one in rounds), key=lambda answer: answer.seconds)
        measurements.append(replace(fastest, prompt=prompt))
    return results[PLAIN][-1].new_ids


def _count_as_server(
    answer: Callable[[torch.Tensor], list[int]],
    target: Any,
    methods: list[Method],
    results: dict[str, list[Measurement]],
    max_new_tokens: int,
    ids: torch.Tensor,
) -> list[int]:
    """Answers a turn, then counts each drafter's answer as a server would."""
    new_ids = answer(ids)
    for method in methods:
        if method.is_coral:
            served = count_as_server(target, ids, method.drafter, max_new_tokens, **method.settings)
            results[method.name][-1].served = served
    return new_ids


def _check(target, tokenizer, methods, prompts, max_new_tokens, temperatures) -> None:
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"The methods are named {names}: give each a name of its own.")
    check_prompts(tokenizer, prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    check_temperatures(temperatures)
    if not temperatures or len(set(temperatures)) < len(temperatures):
        raise ValueError(f"temperatures={temperatures}: give different ones of at least 0 (0 is greedy).")
    for method in methods:
        check_drafter(target, tokenizer, method)


def _write(
    folder: Path, record: dict[str, Any], methods: list[Method], results: Results, partial: bool
) -> dict[str, Any]:
    pooled: Results = {}
    for (_, temperature), result in results.items():
        sums = pooled.setdefault(("all", temperature), {method.name: [] for method in methods})
        for name, measurements in result.items():
            sums[name].extend(measurements)
    rows = [
        result_row(method, benchmark, temperature, result[PLAIN], result[method.name])
        for (benchmark, temperature), result in [*results.items(), *pooled.items()]
        for method in methods
    ]
    record = {**record, "partial": partial, "runs": rows}
    write_json(folder / "benchmark.json", record)
    return record


def differences(record: dict[str, Any]) -> list[str]:
    """A line for every method whose greedy answers differ from plain `generate`'s in a dtype that is exact enough."""
    if record["environment"]["dtype"] not in EXACT_DTYPES:
        return []
    rows = [row for row in record["runs"] if row["benchmark"] == "all" and not row["temperature"]]
    return [
        f"warning: {row['n_turns'] - row['identical']} of {row['n_turns']} greedy answers of {row['method']} differ from "
        f"plain generate's in {record['environment']['dtype']}, which must not happen; `coral-hf verify` shows the first "
        "differing token."
        for row in rows
        if row["identical"] is not None and row["identical"] < row["n_turns"]
    ]


def slower_than_plain(record: dict[str, Any]) -> str | None:
    """Advice if the drafter was slower than plain `generate` with its own settings; None if it was not."""
    slow = [
        row
        for row in record["runs"]
        if row["benchmark"] == "all" and row.get("acceptance_length") and (row.get("speedup") or 1.0) < 1.0
    ]
    if not slow:
        return None
    row = min(slow, key=lambda row: row["speedup"])
    return (
        f"{row['method']} was slower than plain generate ({row['speedup']:.2f}x, {row['acceptance_length']:.2f} tokens per "
        "forward pass). Let `coral-hf tune --save true` choose the draft size for this machine, train longer on more of the "
        "target's own answers, or draft less (--method small:draft_depth=2,draft_top_k=1)."
    )


def print_table(record: dict[str, Any]) -> None:
    """Prints a record's rows as a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The table needs rich: pip install 'coral-hf[eval]'.") from error
    served = any("server_acceptance_length" in row for row in record["runs"])
    title = f"{record['target']}, {record['environment']['dtype']}, {record['environment']['device']}"
    table = Table(
        title=title,
        caption="T: temperature; n: answers, one per turn; same: equal to plain `generate`'s; from: first different token"
        + ("; vLLM: tau as vLLM counts" if served else ""),
    )
    taus = ("tau", "vLLM") if served else ("tau",)
    for column in ("benchmark", "method", "T", "n", "tok/s", "speedup", *taus, "same", "from"):
        named = column in ("benchmark", "method")
        table.add_column(column, justify="left" if named else "right", overflow="fold" if named else "ellipsis")
    for row in record["runs"]:
        divergences = row["first_divergences"]
        lengths = [row["acceptance_length"], row.get("server_acceptance_length")][: len(taus)]
        table.add_row(
            row["benchmark"],
            row["method"],
            f"{row['temperature']:g}",
            str(row["n_turns"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
            *("-" if length is None else f"{length:.2f}" for length in lengths),
            "-" if row["identical"] is None else f"{row['identical']}/{row['n_turns']}",
            str(divergences[0]) if divergences else "-",
        )
    Console().print(table)
    for method, seconds in record.get("compile_seconds", {}).items():
        print(f"{method}: {seconds:.0f} s of compiling, not included in its times")


__all__ = ["describe_run", "differences", "paired_speedup", "print_table", "run_benchmark"]
