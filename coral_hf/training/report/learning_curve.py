"""Plots the learning curve of a training to its output folder."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..losses.terms import TERMS


logger = logging.getLogger(__name__)
CURVE_FILE = "learning_curve.png"


class DrawLearningCurve(TrainerCallback):
    """Draws [`draw_learning_curve`] after each evaluation and at the end; does nothing without matplotlib."""

    def __init__(self) -> None:
        self.available = importlib.util.find_spec("matplotlib") is not None

    def _draw(self, args: Any, state: Any) -> None:
        if self.available and state.is_world_process_zero and Path(args.output_dir).is_dir():
            path = Path(args.output_dir) / CURVE_FILE
            try:
                draw_learning_curve(state.log_history, path)
            except OSError as error:  # a training must not fail because of a plot
                logger.warning("The learning curve could not be written to %s (%s); training continues.", path, error)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(args, state)


def draw_learning_curve(log_history: list[dict[str, Any]], path: str | Path) -> Path | None:
    """Draws each term of the loss, conditional acceptance per rollout step and acceptance length over steps.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): the PNG.

    Returns:
        `Path`, or None if nothing was logged yet.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The learning curve needs matplotlib: pip install 'coral-hf[eval]'.") from error

    panels = {
        f"{term.name} loss": named(log_history, term.name)
        if term.across_steps
        else series(log_history, f"{term.name}_")
        for term in TERMS
    }
    panels |= {
        "conditional acceptance": series(log_history, "acceptance_", also="eval_acceptance_"),
        "acceptance length (simulated)": named(log_history, "acceptance_length", "eval_acceptance_length"),
        "draft head recall": series(log_history, "recall_", also="eval_recall_"),
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    # not pyplot, because its state is global, and the user's notebook may have its own figures
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (title, curves) in zip(places, panels.items(), strict=False):
        for name, points in curves.items():
            evaluated = name.startswith("eval")
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                linestyle="--" if evaluated else "-",
                marker=".",
                clip_on=False,
            )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    path = Path(path)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path


def series(log_history: list[dict[str, Any]], prefix: str, also: str | None = None) -> dict[str, list]:
    """`{name: [(step, value), ...]}` of the logged values named `prefix` or `also` plus a number."""
    found: dict[str, list] = {}
    for row in log_history:
        for name, value in row.items():
            if any(part and name.startswith(part) and name[len(part) :].isdigit() for part in (prefix, also)):
                found.setdefault(name, []).append((row["step"], value))
    return dict(sorted(found.items()))


def named(log_history: list[dict[str, Any]], *names: str) -> dict[str, list]:
    """`{name: [(step, value), ...]}` of the values that were logged under these names."""
    found = {name: [(row["step"], row[name]) for row in log_history if name in row] for name in names}
    return {name: points for name, points in found.items() if points}


__all__ = ["CURVE_FILE", "DrawLearningCurve", "draw_learning_curve"]
