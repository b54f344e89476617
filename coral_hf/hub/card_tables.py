"""A card's tables of measurements, as Markdown. Every figure comes from a record. Missing figures are marked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..drafter.configuration_coral import CoralDraftConfig
from .records import RECORD_FOLDER, Records


NOT_MEASURED = "not measured"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    # a bar ends a cell, even in code, and a line break ends a row
    rows = [[" ".join(cell.replace("|", "\\|").split("\n")) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headline_rows(records: Records) -> list[dict[str, Any]]:
    """The rows of `benchmark.json` for the metadata: one method of the drafter, all benchmarks."""
    main = next((record for name, record in records.benchmarks if name == "benchmark.json"), None)
    if main is None:
        return []
    # prompt lookup and assistants are also measured, but their figures are not the drafter's
    drafting = main.get("drafters") or main.get("draft_settings") or {}
    measured = [row["method"] for row in main["runs"] if row["method"] in drafting]
    # the drafter's own settings, or the first measured ones
    own = [name for name, settings in main.get("methods", {}).items() if not settings and name in measured]
    method = next(iter([*own, *measured]), None)
    rows = [row for row in main["runs"] if row["method"] == method]
    # greedy if measured, else the first temperature, so that there is one figure per benchmark
    temperatures = [row.get("temperature") or 0.0 for row in rows]
    chosen = 0.0 if 0.0 in temperatures else next(iter(temperatures), None)
    return [row for row, temperature in zip(rows, temperatures, strict=True) if temperature == chosen]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns a missing key or a wrong type in a record into a `ValueError` that names the record."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{RECORD_FOLDER}/{name} is not in coral_hf's format ({type(error).__name__}: {error}). Measure again, or "
            "delete it."
        ) from error


def measured_section(records: Records, config: CoralDraftConfig) -> str:
    """Every benchmark record as a table, after a line on the machine."""
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
    parts += [f"`{RECORD_FOLDER}/{name}` is damaged or incomplete: it is left out." for name in records.unusable]
    return "\n\n".join(parts)


def _benchmark(name: str, record: dict[str, Any], config: CoralDraftConfig) -> list[str]:
    rows = [row for row in record["runs"] if row["method"] != "plain"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if name != "benchmark.json" and len(methods) > 1:  # for several settings, the pooled rows are enough
        rows = [row for row in rows if row["benchmark"] == "all"]
    measured = (
        f"{_where(name, record)} Measured by `coral-hf benchmark`, greedy unless stated, {record['max_new_tokens']} new tokens "
        f"per answer; prompts {_prompts(record)}.\n\n"
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
    """Ids of the measured prompts."""
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
        number(row.get("acceptance_length")),
        _shares(row.get("acceptance_per_depth")),
        number(row.get("speedup"), "x") + spread,
        NOT_MEASURED if row.get("identical") is None else f"{row['identical']} of {_answers(row)}",
    ]


def _draft(record: dict[str, Any], method: str, config: CoralDraftConfig) -> str:
    """A method's draft settings, in words."""
    settings = record.get("draft_settings", {}).get(method)
    given = record.get("methods", {}).get(method) or {}
    if settings is None:
        return ", ".join(f"{key}={value}" for key, value in given.items()) or "settings not recorded"
    names = ("draft_depth", "draft_top_k", "draft_total_tokens")
    shape = "chain" if settings["draft_top_k"] == 1 else "tree"
    cost_aware = settings.get("draft_cost_aware", False)
    shape += " of up to" if cost_aware else " of"
    text = f"{shape} {settings['draft_total_tokens']} nodes, the root included, depth {settings['draft_depth']}, "
    branches = settings["draft_top_k"]
    text += f"{branches} {'branch' if branches == 1 else 'branches'} per node, head: {settings.get('draft_head') or 'default'}"
    text += ", size chosen at every step from measured costs" if cost_aware else ""
    # a total of None in the config means the largest possible
    own = [(getattr(config, name), settings[name]) for name in names]
    same_rule = cost_aware == config.draft_cost_aware
    if not given and same_rule and all(now in (None, then) for now, then in own):
        text += " (the drafter's default)"
    return text


def _check(name: str, record: dict[str, Any]) -> str:
    lengths = ", ".join(f"{key} {number(value)}" for key, value in record["acceptance_length"].items())
    settings = ", ".join(f"`{key}={value}`" for key, value in record["settings"].items())
    sampled = "".join(
        f" Sampled with the same seed at temperature {row['temperature']:g}: {row['identical']} of {_answers(row)}."
        for row in record.get("sampled", ())
    )
    return (
        f"Identity: {record['identical']} of {_answers(record)} greedy answers of {record['max_new_tokens']} tokens are "
        f"identical to plain `generate`'s ({settings}).{sampled} Tau: {lengths}. {_where(name, record)}"
    )


def _answers(record: dict[str, Any]) -> int:
    """The number of answers, one per turn."""
    return record["n_turns"]


def _heads(name: str, record: dict[str, Any]) -> str:
    rows = [
        [row["head"], f"{row['active_share']:.1%}", f"{row['uncovered']:.1%}", f"{row['recall']:.1%}"]
        for row in record["curve"]
    ]
    return (
        "Target probability outside the ids that a draft head computes, and how often the target's choice is among them. "
        f"{_where(name, record)}\n\n{table(['head', 'active ids', 'uncovered', 'recall'], rows)}"
    )


def number(value: float | None, unit: str = "") -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}{unit}"


def _shares(values: list[float] | None) -> str:
    return NOT_MEASURED if not values else ", ".join(f"{value:.0%}" for value in values)


__all__ = [
    "NOT_MEASURED",
    "headline_rows",
    "measured_section",
    "number",
    "reading",
    "table",
]
