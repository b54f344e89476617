"""Plots of a benchmark's record."""

from pathlib import Path
from typing import Any

from .methods import PLAIN


_PARTS = ("target_forward", "drafter_layer", "draft_head", "tree", "other")
_FEW = 30  # shares of fewer steps are unreliable


def plot_benchmark(record: dict[str, Any], folder: str | Path, step_time: dict[str, Any] | None = None) -> list[Path]:
    """Draws `speedup.png`, `acceptance_per_depth.png` and, from a step profile, `step_time.png`.

    Args:
        record (`dict`): the result of [`run_benchmark`].
        folder (`str` or `Path`): folder for the plots.
        step_time (`dict`, *optional*): the result of [`profile_methods`].

    Returns:
        `list[Path]`: the plots. Plots without data are skipped.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plots need matplotlib: pip install 'coral-hf[eval]'.") from error
    figures = {"speedup": _speedup(record, Figure), "acceptance_per_depth": _acceptance(record, Figure)}
    if step_time is not None:
        figures["step_time"] = _step_time(step_time, Figure)
    return _saved(figures, folder)


def plot_batches(record: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draws `batches.png`: tokens per second relative to plain `generate`'s, by batch size, and by context if there are several.

    Args:
        record (`dict`): the result of [`run_batches`].
        folder (`str` or `Path`): folder for the plot.

    Returns:
        `list[Path]`: the plot, or nothing if there is no data for it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plots need matplotlib: pip install 'coral-hf[eval]'.") from error
    return _saved({"batches": _batches(record, Figure)}, folder)


def _saved(figures: dict[str, Any], folder: str | Path) -> list[Path]:
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(Path(folder) / f"{name}.png")
            # without matplotlib's version, so that equal records give equal files
            figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def _title(record: dict[str, Any]) -> str:
    """The target (or the drafter, in older profiles) and the machine."""
    where = record.get("environment") or {}
    machine = [
        where.get("device"),
        where.get("dtype"),
        f"{where['threads']} threads" if where.get("threads") else None,
    ]
    name = str(record.get("target") or record.get("drafter") or "").rsplit("/", 1)[-1]
    return "\n".join(filter(None, [name, ", ".join(filter(None, machine))]))


def _legend_above(axes: Any, entries: int) -> None:
    """Places the legend outside the data, between the title and the plot."""
    columns = min(entries, 4)
    axes.legend(fontsize="small", ncols=columns, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)


def _speedup(record: dict[str, Any], figure_type: Any) -> Any:
    """Bars per benchmark and method with the quartiles of the answers, one panel per temperature."""
    rows = [row for row in record["runs"] if row["method"] != PLAIN]
    if len({row["benchmark"] for row in rows}) == 2:  # "all" would show the only benchmark twice
        rows = [row for row in rows if row["benchmark"] != "all"]
    if not rows:
        return None
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    figure = figure_type(figsize=(8, 0.6 + 3.4 * len(temperatures)), layout="constrained")
    for axes, temperature in zip(figure.subplots(len(temperatures), squeeze=False)[:, 0], temperatures, strict=True):
        shown = {(row["method"], row["benchmark"]): row for row in rows if row["temperature"] == temperature}
        methods, benchmarks = (list(dict.fromkeys(key[i] for key in shown)) for i in (0, 1))
        width = 0.8 / len(methods)
        for index, method in enumerate(methods):
            chosen = [shown[method, benchmark] for benchmark in benchmarks]
            heights = [row["speedup"] for row in chosen]
            # the median of few prompts may equal a quartile, and rounding must not make a bar negative
            spread = [
                [max(0.0, row["speedup"] - row["speedup_quartiles"][0]) for row in chosen],
                [max(0.0, row["speedup_quartiles"][1] - row["speedup"]) for row in chosen],
            ]
            places = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(benchmarks))]
            axes.bar(places, heights, width, yerr=spread, capsize=2, label=method)
        axes.axhline(1.0, color="black", linewidth=0.8)
        counts = [max(shown[method, benchmark]["n_turns"] for method in methods) for benchmark in benchmarks]
        names = [f"{name}\n({count} answers)" for name, count in zip(benchmarks, counts, strict=True)]
        axes.set_xticks(range(len(benchmarks)), names)
        decoding = f"temperature {temperature:g}" if temperature else "greedy"
        axes.set(ylabel=f"speedup, {decoding}\n(median and quartiles)")
        _legend_above(axes, len(methods))
    figure.suptitle(_title(record), fontsize="medium")
    return figure


def _batches(record: dict[str, Any], figure_type: Any) -> Any:
    """Lines over batch size, one per method and context, and over context, one per method and batch size."""
    rows = [row for row in record["runs"] if row["method"] != PLAIN]
    names = {"batch_size": "batch size", "context": "tokens of a prompt"}
    shown = [name for name in names if len({row[name] for row in rows} - {None}) > 1]
    if not rows:
        return None
    shown = shown or ["batch_size"]
    figure = figure_type(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        other = "context" if name == "batch_size" else "batch_size"
        lines: dict[tuple[str, Any], list[dict[str, Any]]] = {}
        for row in rows:
            lines.setdefault((row["method"], row[other]), []).append(row)
        for (method, value), line in lines.items():
            line = sorted((row for row in line if row[name] is not None), key=lambda row: row[name])
            label = method if value is None else f"{method}, {'batch' if other == 'batch_size' else 'context'} {value}"
            axes.plot([row[name] for row in line], [row["speedup"] for row in line], marker="o", label=label)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xlabel=names[name], ylabel="speedup over plain generate")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _acceptance(record: dict[str, Any], figure_type: Any) -> Any:
    """The share of steps that accepted depth k among those that reached it, over all benchmarks. Hollow for few steps."""
    rows = [row for row in record["runs"] if row["benchmark"] == "all" and row.get("acceptance_per_depth")]
    if not rows:
        return None
    figure = figure_type(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    few = False
    for row in rows:
        label = row["method"] + (f", temperature {row['temperature']:g}" if row["temperature"] else "")
        shares = row["acceptance_per_depth"]
        reached = row.get("reached_per_depth") or [_FEW] * len(shares)  # older records lack the counts
        depths = range(1, len(shares) + 1)
        (line,) = axes.plot(depths, shares, marker="o", label=f"{label} ({row['steps']:,} steps)", clip_on=False)
        hollow = [(depth, share) for depth, share, n in zip(depths, shares, reached, strict=True) if n < _FEW]
        if hollow:
            few = True
            axes.plot(*zip(*hollow, strict=True), "o", color=line.get_color(), mfc="white", clip_on=False, zorder=3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    note = f" (hollow: fewer than {_FEW} steps reached it)" if few else ""
    axes.set(xlabel=f"depth{note}", ylabel="share of the steps that reached it", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{_title(record)}\naccepted drafts by depth", fontsize="medium")
    return figure


def _step_time(step_time: dict[str, Any], figure_type: Any) -> Any:
    """Stacked bars of a step's parts in milliseconds, one bar per method."""
    methods = {name: row["milliseconds"] for name, row in step_time["methods"].items()}
    if not methods:
        return None
    figure = figure_type(figsize=(8, 1.8 + 0.5 * len(methods)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(methods)
    for part in _PARTS:
        widths = [parts.get(part, 0.0) for parts in methods.values()]
        axes.barh(list(methods), widths, left=left, label=part.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds per step")
    axes.legend(fontsize="small", ncols=len(_PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(_title(step_time), fontsize="medium")
    return figure


__all__ = ["plot_batches", "plot_benchmark"]
