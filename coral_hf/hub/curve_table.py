"""Plots the training curve."""

from pathlib import Path

from .records import RECORD_FOLDER, read_records
from .training_tables import curve_rows, tokens_seen


def draw_curve(folder: str | Path) -> Path:
    """Draws held-out tau over response tokens seen, from `training/log.jsonl`, to `training/curve.png`.

    Raises:
        ValueError: if the log contains no evaluation.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The curve needs matplotlib: pip install 'coral-hf[eval]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    training = Path(folder) / RECORD_FOLDER
    records = read_records(folder, unmeasured=True, strict=False)
    rows = curve_rows(records.log)
    if not rows:
        raise ValueError(f"{training / 'log.jsonl'} contains no evaluation to draw: train with --eval_strategy steps.")
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    stages = list(dict.fromkeys(row.get("stage") for row in rows))
    for stage in stages:  # not joined, because each stage may be evaluated on other answers
        points = [
            ((tokens_seen(row) or 0) / 1e6, row["eval_acceptance_length"]) for row in rows if row.get("stage") == stage
        ]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"stage {stage}", clip_on=False)
    axes.set(xlabel="response tokens seen (millions)", ylabel="tau of simulated chains, held out")
    axes.grid(alpha=0.3)
    if len(stages) > 1:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    name = records.stated.get("title") or Path(folder).resolve().name
    figure.suptitle(f"{name}: acceptance length over training", fontsize="medium")
    path = training / "curve.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


__all__ = ["draw_curve"]
