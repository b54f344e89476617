"""Finds the draft size that pays for a target and a drafter on this machine: measured costs, replayed acceptance, predictions."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.prompts import Prompt, check_prompts, describe_prompts
from ..drafter.configuration_coral import DERIVED, CoralDraftConfig
from ..generation.costs.measurement import measure_costs
from ..generation.settings import DraftSettings
from ..generation.tree_size import Calibration, DraftCosts, TreeSizeRule
from ..utils.whole_files import write_json
from .draft_traces import DraftTrace, fit_calibration, record_traces, replay_all
from .environment import describe_drafter, describe_environment, describe_rendering, describe_target
from .methods import Method, check_drafter
from .prediction import predict_speedup


TOTALS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 60)
RECORD_FILE = "tune.json"
SIZES = ("draft_depth", "draft_top_k", "draft_total_tokens", "draft_active_groups")


def tune(
    target: Any,
    tokenizer: Any,
    drafter: Any,
    prompts: Sequence[Prompt],
    box: DraftSettings,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures costs and acceptance, and predicts the speedup of every fixed size and of cost-aware trees.

    Args:
        target (`PreTrainedModel`), tokenizer, drafter ([`CoralDraftModel`])
        prompts (`list[Prompt]`): first turns are answered by plain `generate`, and drafted at every token.
        box ([`DraftSettings`]): the largest depth, top_k and total_tokens to try, and the head to draft with.
        max_new_tokens (`int`), temperature (`float`), seed (`int`): settings of the answers.

    Returns:
        `dict`: the record. `target_ms` (T(n)), `drafting` (times per width), `fixed` and `cost_aware` (rows with sizes,
        `acceptance_length`, `step_ms` and `predicted_speedup`, best first), `calibration`. Speedups are predictions.

    Raises:
        ValueError: if there are no prompts, or the drafter belongs to another target.
    """
    check_prompts(tokenizer, prompts)
    check_drafter(target, tokenizer, Method("tune", drafter))
    record: dict[str, Any] = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_run(target, tokenizer, drafter, prompts, max_new_tokens, temperature),
        "drafting": [],
        "fixed": [],
        "cost_aware": [],
    }
    target_ms: Any = None
    for groups in _active_groups(drafter, box):
        settings = replace(box, draft_active_groups=groups)
        costs = {}
        for top_k in range(box.draft_top_k, 0, -1):
            # T(n) belongs to the target, so once is enough
            total = box.draft_total_tokens if target_ms is None else 2
            sizes = replace(settings, draft_top_k=top_k, draft_total_tokens=total)
            measured = measure_costs(target, drafter, sizes)
            target_ms = target_ms or measured.target_ms
            costs[top_k] = replace(measured, target_ms=target_ms)
            times = {"first_level_ms": measured.first_level_ms, "level_ms": measured.level_ms}
            record["drafting"].append({"draft_top_k": top_k, "draft_active_groups": groups, **times})
        traces = record_traces(target, tokenizer, drafter, prompts, settings, max_new_tokens, temperature, seed)
        record.setdefault("prefill_steps", _prefill_steps(traces))
        fixed, cost_aware = _rows(traces, costs, settings, record["prefill_steps"])
        best = max(cost_aware, key=_speedup)["predicted_speedup"]
        if best > max(map(_speedup, record["cost_aware"]), default=0.0):
            record["calibration"] = [list(row) for row in fit_calibration(traces).rows]
        record["fixed"] += fixed
        record["cost_aware"] += cost_aware
    record["target_ms"] = list(target_ms)
    for name in ("fixed", "cost_aware"):
        record[name].sort(key=_speedup, reverse=True)
    return record


def describe_run(
    target: Any, tokenizer: Any, drafter: Any, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    """The record's description of the measurement. Arguments are those of [`tune`]."""
    return {
        **describe_target(target),
        **describe_rendering(tokenizer),
        **describe_drafter(drafter),
        "n_prompts": len(prompts),
        **describe_prompts(prompts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }


def _speedup(row: dict[str, Any]) -> float:
    return row["predicted_speedup"]


def _active_groups(drafter: Any, box: DraftSettings) -> list[int | None]:
    """The router's choice, half and twice of it; None if no router is used."""
    router = box.router_of(drafter)
    if router is None:
        return [None]
    active = box.draft_active_groups or drafter.config.router_active_groups
    return sorted({max(1, active // 2), active, min(router.num_groups, 2 * active)})


def _prefill_steps(traces: Sequence[DraftTrace]) -> float:
    """Time of the prefill in plain steps, measured side by side."""
    steps = sum(trace.num_tokens - 1 for trace in traces)
    prefill = sum(trace.prefill_seconds for trace in traces)
    decoding = sum(trace.seconds for trace in traces) - prefill
    return prefill / len(traces) / (decoding / steps) if decoding > 0 else 0.0


def _rows(traces: list[DraftTrace], costs: dict[int, DraftCosts], box: DraftSettings, prefill_steps: float):
    fixed, cost_aware = [], []
    # A calibration is evaluated on answers that it was not fitted to.
    halves = [traces[::2], traces[1::2]] if len(traces) > 1 else [traces, traces]
    fitted = [fit_calibration(half) for half in reversed(halves)]
    for top_k in range(1, box.draft_top_k + 1):
        for depth in range(1, box.draft_depth + 1):
            for sizes in _sizes(box, depth, top_k):
                stats, steps = replay_all(traces, sizes)
                fixed.append(_row(traces, sizes, costs[top_k], stats, steps, prefill_steps))
        for sizes in _sizes(box, box.draft_depth, top_k):
            rule = TreeSizeRule(costs[top_k], sizes.draft_total_tokens)
            stats, steps = _held_out(halves, fitted, sizes, rule)
            sizes = replace(sizes, draft_cost_aware=True)
            row = _row(traces, sizes, costs[top_k], stats, steps, prefill_steps)
            mean = {"mean_levels": sum(s[0] for s in steps) / len(steps)}
            mean["mean_nodes"] = sum(s[1] for s in steps) / len(steps)
            cost_aware.append({**row, **mean})
    return fixed, cost_aware


def _held_out(halves, fitted: list[Calibration], sizes: DraftSettings, rule: TreeSizeRule):
    (stats, steps), (other, more) = (
        replay_all(half, sizes, rule, calibration) for half, calibration in zip(halves, fitted, strict=True)
    )
    return stats.merge(other), steps + more


def _sizes(box: DraftSettings, depth: int, top_k: int) -> list[DraftSettings]:
    most = min(
        box.draft_total_tokens,
        replace(box, draft_depth=depth, draft_top_k=top_k, draft_total_tokens=DERIVED).draft_total_tokens,
    )
    # A chain verifies everything that it drafted. A tree with fewer nodes than levels would draft some in vain.
    totals = [most] if top_k == 1 else sorted({total for total in (*TOTALS, most) if depth < total <= most})
    return [replace(box, draft_depth=depth, draft_top_k=top_k, draft_total_tokens=total) for total in totals]


def _row(traces, sizes: DraftSettings, costs: DraftCosts, stats, steps, prefill_steps: float) -> dict[str, Any]:
    times = [costs.step_ms(max(levels, 1), nodes) for levels, nodes in steps]
    step_ms, plain_ms = sum(times) / len(times), costs.target_ms[0]
    tokens = sum(trace.num_tokens for trace in traces) / len(traces)
    length = stats.acceptance_length
    return {
        **{name: getattr(sizes, name) for name in SIZES},
        "acceptance_length": length,
        "acceptance_per_depth": stats.acceptance_per_depth,
        "step_ms": step_ms,
        "predicted_speedup": predict_speedup(plain_ms, step_ms, length, round(tokens), prefill_steps * plain_ms),
    }


def chosen_settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings of a drafter's config that a record recommends: cost-aware if that is predicted to be best."""
    fixed, cost_aware = record["fixed"][0], record["cost_aware"][0]
    aware = cost_aware["predicted_speedup"] > fixed["predicted_speedup"]
    best = cost_aware if aware else fixed
    settings = {name: best[name] for name in SIZES[:3]}
    if best["draft_active_groups"] is not None:
        settings["router_active_groups"] = best["draft_active_groups"]
    return {**settings, "draft_cost_aware": aware, "draft_calibration": record["calibration"]}


def slower_than_plain(record: dict[str, Any]) -> str | None:
    """A warning if no size is predicted to be faster than plain `generate`."""
    best = max(rows[0]["predicted_speedup"] for rows in (record["fixed"], record["cost_aware"]))
    if best > 1:
        return None
    return (
        f"warning: no draft size is predicted to be faster than plain generate on this machine: the best gives {best:.2f}x. Use "
        "no drafter for this target here, or one that is trained better."
    )


def save_settings(folder: str | Path, settings: dict[str, Any]) -> None:
    """Writes settings to the config of a drafter's folder. Its weights stay unchanged.

    Raises:
        ValueError: if the folder contains no drafter, or the settings are invalid.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a drafter's folder: save the drafter there first (save_pretrained).")
    config = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    CoralDraftConfig.from_dict(config)  # rejects unknown settings
    write_json(path, dict(sorted(config.items())))


def write_record(record: dict[str, Any], folder: str | Path) -> Path:
    """Writes `tune.json`."""
    path = Path(folder) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def print_record(record: dict[str, Any], count: int = 5) -> None:
    """Prints T(n), and the best fixed and cost-aware settings with their predictions."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The table needs rich: pip install 'coral-hf[eval]'.") from error
    times = record["target_ms"]
    shown = [n for n in (1, 2, 4, 8, 12, 16, 24, 32, 48, 60) if n <= len(times)]
    print("T(n) in ms: " + ", ".join(f"{n}: {times[n - 1]:.1f}" for n in shown))
    environment = record["environment"]
    title = f"predicted, not measured: {record['target']}, {environment['dtype']}, {environment['threads']} threads"
    table = Table(
        title=title, caption="k: branches per node; nodes: including the root; tau: tokens per step, replayed"
    )
    for column in ("draft", "depth", "k", "nodes", "groups", "tau", "ms a step", "speedup"):
        table.add_column(column, justify="left" if column == "draft" else "right")
    for name in ("fixed", "cost_aware"):
        for row in record[name][:count]:
            sizes = ["-" if row[key] is None else str(row[key]) for key in SIZES]
            how = "fixed" if name == "fixed" else f"cost-aware ({row['mean_nodes']:.1f} nodes)"
            figures = f"{row['acceptance_length']:.2f}", f"{row['step_ms']:.1f}", f"{row['predicted_speedup']:.2f}x"
            table.add_row(how, *sizes, *figures)
    Console().print(table)


__all__ = [
    "RECORD_FILE",
    "chosen_settings",
    "describe_run",
    "print_record",
    "save_settings",
    "slower_than_plain",
    "tune",
    "write_record",
]
