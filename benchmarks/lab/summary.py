"""Summarises runs as means, intervals, differences, and a plot."""

import math
import statistics
from pathlib import Path
from typing import Any

from .recipes import BASELINE


# Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond them the normal distribution's
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# name: where a run has it
MEASURES = {
    "chain, temperature 0": ("temperature_0", "tau"),
    "chain, temperature 1": ("temperature_1", "tau"),
    "overlap, temperature 1": ("temperature_1", "overlap"),
    "agreement, temperature 1": ("temperature_1", "agreement"),
    "tree, temperature 0": ("temperature_0", "tree_tau"),
    "tree, temperature 1": ("temperature_1", "tree_tau"),
}
LEAST_NOISE = "overlap, temperature 1"


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and half the width of its 95 % interval over seeds (Student's t); None for one value."""
    count = len(values)
    half = None
    if count > 1:
        t = _T[count - 2] if count - 2 < len(_T) else 1.96
        half = round(t * statistics.stdev(values) / math.sqrt(count), 4)
    return {"mean": round(statistics.mean(values), 4), "interval": half, "seeds": count}


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each recipe and measure, the mean with its interval, and the difference from the baseline over the same seeds."""
    found: dict[str, dict[str, Any]] = {}
    by_seed = {(run["recipe"], run["seed"]): run for run in runs}
    for name in dict.fromkeys(run["recipe"] for run in runs):
        seeds = [run["seed"] for run in runs if run["recipe"] == name]
        found[name] = {}
        for measure, (part, key) in MEASURES.items():
            if any(key not in run[part] for run in runs):
                continue  # trees were not measured
            values = {seed: _value(by_seed[name, seed][part][key]) for seed in seeds}
            found[name][measure] = interval(list(values.values()))
            shared = [seed for seed in seeds if (BASELINE, seed) in by_seed and name != BASELINE]
            if shared:
                gains = [values[seed] - _value(by_seed[BASELINE, seed][part][key]) for seed in shared]
                found[name][measure][f"minus {BASELINE}"] = interval(gains)
    return found


def _value(found: float | list[float]) -> float:
    """The mean of values by depth."""
    return statistics.mean(found) if isinstance(found, list) else found


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary in Markdown, the largest overlap first."""
    order = sorted(summary, key=lambda name: -summary[name][LEAST_NOISE]["mean"])
    measures = [measure for measure in MEASURES if measure in summary[order[0]]]
    lines = [f"| recipe | seeds | {' | '.join(measures)} | {LEAST_NOISE}, minus {BASELINE} |"]
    lines.append("| --- " * (len(measures) + 3) + "|")
    for name in order:
        row = summary[name]
        gain = row[LEAST_NOISE].get(f"minus {BASELINE}")
        cells = [_cell(row[measure]) for measure in measures] + ["" if gain is None else _cell(gain, sign="+")]
        lines.append(f"| {name} | {row[LEAST_NOISE]['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: dict[str, Any], sign: str = "") -> str:
    spread = "" if value["interval"] is None else f" ± {value['interval']:.3f}"
    return f"{value['mean']:{sign}.3f}{spread}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Acceptance of every recipe with its interval, and the learning curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = record["summary"]
    names = sorted(summary, key=lambda name: summary[name][LEAST_NOISE]["mean"])
    figure = Figure(figsize=(13, 1.5 + 0.35 * max(8, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for measure, marker in (("overlap, temperature 1", "o"), ("agreement, temperature 1", "s")):
        values = [summary[name][measure] for name in names]
        spread = [value["interval"] or 0.0 for value in values]
        left.errorbar([value["mean"] for value in values], names, xerr=spread, fmt=marker, capsize=3, label=measure)
    left.set(xlabel="mean over five depths, 95 % intervals over seeds", title="held-out answers of temperature 1")
    left.legend(fontsize="small")
    left.grid(alpha=0.3)
    for name in reversed(names):
        curves = [run["curve"] for run in record["runs"] if run["recipe"] == name]
        points = zip(*curves, strict=True)
        means = [
            (column[0]["response_tokens"], statistics.mean(point["tau"] for point in column)) for column in points
        ]
        right.plot(*zip(*means, strict=True), marker=".", label=name)
    right.set(xlabel="response tokens", ylabel="chain tau, temperature 0", title="learning curves, mean over seeds")
    right.legend(fontsize="x-small")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=90, metadata={"Software": None})


__all__ = ["MEASURES", "draw", "interval", "summarize", "table"]
