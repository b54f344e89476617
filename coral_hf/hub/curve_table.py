"""The training curve as a picture."""

from pathlib import Path

from .card_tables import curve_rows, tokens_seen
from .records import RECORD_FOLDER, read_records


def draw_curve(folder: str | Path) -> Path:
    """Draws held-out tau over response tokens seen, from `training/log.jsonl`, to `training/curve.png`.

    Raises:
        ValueError: if the log holds no evaluation.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The curve needs matplotlib: pip install 'coral-hf[eval]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    training = Path(folder) / RECORD_FOLDER
    rows = curve_rows(read_records(folder, unmeasured=True, strict=False).log)
    if not rows:
        raise ValueError(f"{training / 'log.jsonl'} holds no evaluation to draw: train with --eval_strategy steps.")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(
        [(tokens_seen(row) or 0) / 1e6 for row in rows], [row["eval_acceptance_length"] for row in rows], marker="."
    )
    axes.set(xlabel="response tokens seen (millions)", ylabel="held-out acceptance length (tau)")
    axes.grid(alpha=0.3)
    path = training / "curve.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


__all__ = ["draw_curve"]
