"""A card's tables and lists, as Markdown: every figure is read from a record, and what no record holds says so."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..drafter.configuration_coral import CoralDraftConfig
from .records import RECORD_FOLDER, Records


NOT_MEASURED = "not measured"
_CURVE_ROWS = 8


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    # a bar ends a cell, in code too, and a line its row
    rows = [[" ".join(cell.replace("|", "\\|").split("\n")) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headline_rows(records: Records) -> list[dict[str, Any]]:
    """The rows of `benchmark.json` whose figures go into the metadata: one method of the drafter's, every benchmark."""
    main = next((record for name, record in records.benchmarks if name == "benchmark.json"), None)
    if main is None:
        return []
    # prompt lookup and assistants are measured beside the drafter: theirs are no figures of it
    drafting = main.get("drafters") or main.get("draft_settings") or {}
    measured = [row["method"] for row in main["runs"] if row["method"] in drafting]
    # the drafter's own settings, or the first that was measured
    own = [name for name, settings in main.get("methods", {}).items() if not settings and name in measured]
    method = next(iter([*own, *measured]), None)
    rows = [row for row in main["runs"] if row["method"] == method]
    # greedy, or what comes first: one figure a benchmark
    temperatures = [row.get("temperature") or 0.0 for row in rows]
    chosen = 0.0 if 0.0 in temperatures else next(iter(temperatures), None)
    return [row for row, temperature in zip(rows, temperatures, strict=True) if temperature == chosen]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever a record lacks, or holds of another type, is a `ValueError` that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{RECORD_FOLDER}/{name} is not as coral_hf writes it ({type(error).__name__}: {error}). Measure again, or "
            "delete it."
        ) from error


# Measured ------------------------------------------------------------------------------------------------------------


def measured_section(records: Records, config: CoralDraftConfig) -> str:
    """Every benchmark record as a table under the line that says where it was measured."""
    parts = []
    for name, record in records.benchmarks:
        with reading(name):
            parts += _benchmark(name, record, config)
    if not records.benchmarks:
        parts.append(table(["prompts", "tau", "speedup"], [["all", NOT_MEASURED, NOT_MEASURED]]))
    for name, record in records.checks:
        with reading(name):
            parts.append(_check(name, record))
    if not records.checks:
        parts.append(f"Identity with plain `generate` in float32 on real prompts: {NOT_MEASURED}.")
    for name, record in records.heads:
        with reading(name):
            parts.append(_heads(name, record))
    parts += [
        f"`{RECORD_FOLDER}/{name}` does not say which drafter it measured: its figures are not shown."
        for name in records.anonymous
    ]
    parts += [
        f"`{RECORD_FOLDER}/{name}` measured another drafter: its figures are not shown." for name in records.foreign
    ]
    parts += [
        f"`{RECORD_FOLDER}/{name}` is damaged, or of a run that was cut off: it is left out."
        for name in records.unusable
    ]
    return "\n\n".join(parts)


def _benchmark(name: str, record: dict[str, Any], config: CoralDraftConfig) -> list[str]:
    rows = [row for row in record["runs"] if row["method"] != "plain"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if name != "benchmark.json" and len(methods) > 1:  # settings side by side: the sum is enough
        rows = [row for row in rows if row["benchmark"] == "all"]
    measured = (
        f"{_where(name, record)} By `coral-hf benchmark`, greedy unless stated, {record['max_new_tokens']} new tokens an "
        f"answer; prompts {_prompts(record)}.\n\n"
        + table(
            [
                "method",
                "prompts of (answers)",
                "tau",
                "accepted per depth",
                "speedup (quartiles)",
                "same tokens as plain",
            ],
            [_benchmark_row(row) for row in rows],
        )
    )
    return [measured, "\n".join(f"- `{method}`: {_draft(record, method, config)}" for method in methods)]


def _prompts(record: dict[str, Any]) -> str:
    """Which prompts were measured, by their ids."""
    spans = []
    for ids in record["prompts"].values():
        spans.append(ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]} ({len(ids)})")
    return ", ".join(spans)


def _where(name: str, record: dict[str, Any]) -> str:
    environment = record["environment"]
    return (
        f"`{RECORD_FOLDER}/{name}`: {environment['device']}, {environment['dtype']}, {environment['threads']} CPU "
        f"threads; torch {environment['torch']}, transformers {environment['transformers']}, coral_hf "
        f"{environment['coral_hf']}, commit {environment.get('commit') or 'not recorded'}; drafter sha256 "
        f"{record['drafter_sha256'][:12]}."
    )


def _benchmark_row(row: dict[str, Any]) -> list[str]:
    temperature = row.get("temperature") or 0.0
    quartiles = row.get("speedup_quartiles")
    spread = f" ({quartiles[0]:.2f} to {quartiles[1]:.2f})" if quartiles else ""
    return [
        f"`{row['method']}`" + (f", temperature {temperature:g}" if temperature else ""),
        f"{row['benchmark']} ({_answers(row)})",
        _number(row.get("acceptance_length")),
        _shares(row.get("acceptance_per_depth")),
        _number(row.get("speedup"), "x") + spread,
        NOT_MEASURED if row.get("identical") is None else f"{row['identical']} of {_answers(row)}",
    ]


def _draft(record: dict[str, Any], method: str, config: CoralDraftConfig) -> str:
    """What a method drafted with, in words."""
    settings = record.get("draft_settings", {}).get(method)
    given = record.get("methods", {}).get(method) or {}
    if settings is None:
        return ", ".join(f"{key}={value}" for key, value in given.items()) or "settings not recorded"
    names = ("draft_depth", "draft_top_k", "draft_total_tokens")
    shape = "chain" if settings["draft_top_k"] == 1 else "tree"
    cost_aware = settings.get("draft_cost_aware", False)
    shape += " of up to" if cost_aware else " of"
    text = f"{shape} {settings['draft_total_tokens']} nodes with the root, depth {settings['draft_depth']}, "
    text += f"{settings['draft_top_k']} branches a node, head: {settings.get('draft_head') or 'all that it has'}"
    text += ", sizes decided at every step by measured costs" if cost_aware else ""
    # a total of None in the config stands for the largest
    own = [(getattr(config, name), settings[name]) for name in names]
    same_rule = cost_aware == config.draft_cost_aware
    if not given and same_rule and all(now in (None, then) for now, then in own):
        text += " (the drafter's default)"
    return text


def _check(name: str, record: dict[str, Any]) -> str:
    lengths = ", ".join(f"{key} {_number(value)}" for key, value in record["acceptance_length"].items())
    settings = ", ".join(f"`{key}={value}`" for key, value in record["settings"].items())
    sampled = "".join(
        f" Sampled with the same seed at temperature {row['temperature']:g}: {row['identical']} of {_answers(row)}."
        for row in record.get("sampled", ())
    )
    return (
        f"Identity: {record['identical']} of {_answers(record)} greedy answers of {record['max_new_tokens']} tokens are "
        f"plain `generate`'s to the token ({settings}).{sampled} Tau: {lengths}. {_where(name, record)}"
    )


def _answers(record: dict[str, Any]) -> int:
    """Answers measured, one to every turn."""
    return record["n_turns"]


def _heads(name: str, record: dict[str, Any]) -> str:
    rows = [
        [row["head"], f"{row['active_share']:.1%}", f"{row['uncovered']:.1%}", f"{row['recall']:.1%}"]
        for row in record["curve"]
    ]
    return (
        "Target probability outside the ids that a draft head computes, and how often the target's choice is inside. "
        f"{_where(name, record)}\n\n{table(['head', 'active ids', 'uncovered', 'recall'], rows)}"
    )


def _number(value: float | None, unit: str = "") -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}{unit}"


def _shares(values: list[float] | None) -> str:
    return NOT_MEASURED if not values else ", ".join(f"{value:.0%}" for value in values)


# Training ------------------------------------------------------------------------------------------------------------


def training_section(records: Records) -> str:
    """Data, runs, commands and the curve."""
    parts = [records.stated["data"]] if records.stated.get("data") else []
    parts += _responses(records.folder)
    with reading("training*.json"):
        parts += [_stage(stage) for stage in records.stages]
    with reading("log.jsonl"):
        parts += _progress(records)
    if records.ablation is not None:
        with reading("ablation.json"):
            parts.append(_ablation(records.ablation))
    if not parts:
        parts.append("Not recorded.")
    if (records.folder / RECORD_FOLDER / "curve.png").is_file():
        parts.append(f"![Acceptance over training]({RECORD_FOLDER}/curve.png)")
    return "\n\n".join(parts)


def _progress(records: Records) -> list[str]:
    """What the log says, and the commands beside it."""
    parts = []
    seen = [count for row in records.log if (count := tokens_seen(row)) is not None]
    if seen:
        parts.append(f"{seen[-1]:,} response tokens seen, repetitions counted (`{RECORD_FOLDER}/log.jsonl`).")
    commands = records.folder / RECORD_FOLDER / "commands.sh"
    if commands.is_file():
        parts.append(f"```bash\n{commands.read_text(encoding='utf-8').strip()}\n```")
    curve = curve_rows(records.log)
    if curve:
        depths = sorted({int(key.rsplit("_", 1)[1]) for row in curve for key in row if _is_depth(key)})
        rows = [
            [f"{tokens_seen(row):,}", _number(row["eval_acceptance_length"])]
            + [f"{row[key]:.0%}" if (key := f"eval_acceptance_{depth}") in row else NOT_MEASURED for depth in depths]
            for row in _thinned(curve)
        ]
        parts.append(
            f"Held out, simulated greedy chains of {len(depths)} with the full head:\n\n"
            + table(["response tokens seen", "tau", *(f"accepted at depth {depth}" for depth in depths)], rows)
        )
    return parts


def tokens_seen(row: dict[str, Any]) -> int | None:
    """Response tokens seen at a row of the log."""
    names = ("response_tokens_seen", "response_tokens", "eval_response_tokens_seen")
    return next((row[name] for name in names if name in row), None)


def curve_rows(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log's evaluations."""
    return [row for row in log if "eval_acceptance_length" in row and tokens_seen(row) is not None]


def _is_depth(key: str) -> bool:
    return key.startswith("eval_acceptance_") and key.rsplit("_", 1)[1].isdigit()


def _thinned(rows: list[Any]) -> list[Any]:
    """At most `_CURVE_ROWS`, evenly spaced, the first and the last among them."""
    if len(rows) <= _CURVE_ROWS:
        return rows
    return [rows[round(index * (len(rows) - 1) / (_CURVE_ROWS - 1))] for index in range(_CURVE_ROWS)]


def _responses(folder: Path) -> list[str]:
    shards = sorted((folder / "responses").glob("*.parquet"))
    if not shards:
        return []
    try:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Counting the responses needs pyarrow: pip install 'coral-hf[train]'.") from error
    rows = tokens = 0
    for shard in shards:
        column = pq.read_table(shard, columns=["response_ids"]).column("response_ids")
        rows += len(column)
        tokens += pc.sum(pc.list_value_length(column)).as_py()
    return [f"`responses/` holds {rows:,} answers that the target itself wrote, {tokens:,} tokens."]


def _ablation(record: dict[str, Any]) -> str:
    environment, runs = record["environment"], record["runs"]
    steps = ", ".join(f"{count:,}" for count in sorted({run["steps"] for run in runs}))
    # of the runs: the record's summary is rounded already
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run["eval_acceptance_length"])
    rows = [
        [
            f"`{name}`",
            f"{statistics.mean(values):.3f}",
            f"{statistics.stdev(values):.3f}" if len(values) > 1 else NOT_MEASURED,
            ", ".join(f"{value:.3f}" for value in values),
        ]
        for name, values in found.items()
    ]
    return (
        f"The recipes side by side (`{RECORD_FOLDER}/ablation.json`, by `benchmarks/ablate_training.py`): small trainings from "
        f"random weights, not this drafter, all on the same {record['response_tokens']:,} response tokens for {steps} steps; "
        f"tau of simulated greedy chains of {record['chain_depth']} with the full head on held-out answers, one value a "
        f"seed. {environment['device']}, {environment['dtype']}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}, coral_hf {environment['coral_hf']}, commit "
        f"{environment.get('commit') or 'not recorded'}.\n\n"
        + table(["preset", "tau, mean", "standard deviation", "values"], rows)
    )


def _stage(stage: dict[str, Any]) -> str:
    environment, count = stage["environment"], stage["conversations"]
    conversations = "a stream of conversations" if count is None else f"{count:,} conversations"
    # records of before these were kept lack them
    data = f" of {', '.join(f'`{name}`' for name in stage['data'])}" if stage.get("data") else ""
    target = f" for `{stage['target']}`" if stage.get("target") else ""
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    lines = [
        f"Stage `{stage['stage']}`{target}: {stage['steps']:,} steps over {conversations}{data}, "
        f"{stage['response_tokens_seen']:,} response tokens seen. {environment['device']}; torch {environment['torch']}, "
        f"transformers {environment['transformers']}, coral_hf {environment['coral_hf']}{commit}.",
    ]
    if stage["arguments"]:
        arguments = ", ".join(f"`{key}={value}`" for key, value in sorted(stage["arguments"].items()))
        lines.append(f"Settings other than the defaults: {arguments}.")
    if stage.get("chosen"):  # records of before there was a recipe lack it
        chosen = ", ".join(f"`{key}={value}`" for key, value in sorted(stage["chosen"].items()))
        lines.append(f"Chosen for this target, data and device: {chosen}.")
    return " ".join(lines)


__all__ = [
    "NOT_MEASURED",
    "curve_rows",
    "headline_rows",
    "measured_section",
    "reading",
    "table",
    "tokens_seen",
    "training_section",
]
