"""Predicts speedups from times and acceptance. The results are predictions, never measurements."""

from collections.abc import Sequence
from typing import Any

from ..generation.tree_size import DraftCosts


WANTED_ERROR = 0.10  # a prediction is reliable if its error is at most this share of the measured speedup


def expected_acceptance_length(acceptance_per_depth: Sequence[float]) -> float:
    """tau from the conditional acceptance at depth 1, 2, ...: 1 + a_1 + a_1 a_2 + ...

    Raises:
        ValueError: if an acceptance is not between 0 and 1.
    """
    if not all(0 <= acceptance <= 1 for acceptance in acceptance_per_depth):
        raise ValueError(f"acceptance_per_depth={list(acceptance_per_depth)}: give shares from 0 to 1.")
    length = reached = 1.0
    for acceptance in acceptance_per_depth:
        reached *= acceptance
        length += reached
    return length


def predict_speedup(
    plain_ms: float, step_ms: float, acceptance_length: float, tokens: int | None = None, prefill_ms: float = 0.0
) -> float:
    """Speedup over plain decoding.

    Args:
        plain_ms (`float`): time of a plain step, which yields one token.
        step_ms (`float`): time of drafting and verifying, which yields `acceptance_length` tokens.
        acceptance_length (`float`): tau, including the bonus token.
        tokens (`int`, *optional*), prefill_ms (`float`): length of the answer, and the time of the prefill in both cases.

    Raises:
        ValueError: if a time is not positive or tau below 1.
    """
    if plain_ms <= 0 or step_ms <= 0 or prefill_ms < 0 or acceptance_length < 1 or (tokens is not None and tokens < 1):
        raise ValueError(
            f"plain_ms={plain_ms}, step_ms={step_ms}, prefill_ms={prefill_ms}, acceptance_length={acceptance_length}, "
            f"tokens={tokens}: times must be positive, an acceptance length at least 1."
        )
    per_token = step_ms / acceptance_length
    if tokens is None:
        return plain_ms / per_token
    return (prefill_ms + tokens * plain_ms) / (prefill_ms + tokens * per_token)


def costs_of(record: dict[str, Any], draft_top_k: int, active_groups: int | None = None) -> DraftCosts | None:
    """The costs in a record of `coral-hf tune` for a width; None if it was not measured."""
    for row in record["drafting"]:
        if row["draft_top_k"] == draft_top_k and row["draft_active_groups"] == active_groups:
            return DraftCosts(tuple(record["target_ms"]), row["first_level_ms"], row["level_ms"])
    return None


def check_predictions(tuned: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Predictions from a machine's costs and a benchmark's acceptance, compared with the measured speedups.

    Args:
        tuned (`dict`): the record of `coral-hf tune` from the same machine.
        measured (`dict`): the record of `coral-hf benchmark`.

    Returns:
        `list[dict]`: `method`, `benchmark`, `temperature`, `predicted`, `measured` and `error` (relative to the measured
        speedup) for every row whose settings the costs cover: fixed sizes, and cost-aware trees at their replayed mean sizes.
        In a benchmark of several drafters, only the rows of the tuned one.

    Raises:
        ValueError: if the records differ in dtype, threads, device, target or drafter.
    """
    for name in ("device", "dtype", "threads"):
        one, other = tuned["environment"][name], measured["environment"][name]
        if one != other:
            raise ValueError(f"The costs were measured with {name}={one!r}, the benchmark with {other!r}: tune again.")
    targets = tuned.get("target"), measured.get("target")
    if all(targets) and targets[0] != targets[1]:
        raise ValueError(f"The costs are of target {targets[0]!r}, the benchmark is of {targets[1]!r}: tune again.")
    own = tuned.get("drafter_sha256")
    hashes = {method: sha256 for method in measured["draft_settings"] if (sha256 := drafter_of(measured, method))}
    if own and hashes and own not in hashes.values():
        found = ", ".join(sorted({sha256[:12] for sha256 in hashes.values()}))
        raise ValueError(
            f"The costs are of a drafter with drafter_sha256 {own[:12]}..., the benchmark is of {found}...: tune again."
        )
    rows = []
    for row in measured["runs"]:
        settings = measured["draft_settings"].get(row["method"])
        if own and hashes.get(row["method"], own) != own:
            continue
        step_ms = None if settings is None else _step_ms(tuned, settings)
        if step_ms is None or not row.get("steps"):
            continue
        tokens = max(1, round(row["new_tokens"] / row["n_turns"]))
        # The machine may have been faster or slower during tuning, but the share of the prefill is the same.
        prefill_ms = tuned["prefill_steps"] * tuned["target_ms"][0]
        predicted = predict_speedup(tuned["target_ms"][0], step_ms, row["acceptance_length"], tokens, prefill_ms)
        keys = ("method", "benchmark", "temperature")
        error = predicted / row["speedup"] - 1
        rows.append(
            {**{key: row[key] for key in keys}, "predicted": predicted, "measured": row["speedup"], "error": error}
        )
    return rows


def drafter_of(measured: dict[str, Any], method: str) -> str | None:
    """The hash of the drafter's weights for a method of a benchmark; None if the record lacks it."""
    drafter = measured.get("drafters", {}).get(method, measured)
    return drafter.get("drafter_sha256")


def _step_ms(tuned: dict[str, Any], settings: dict[str, Any]) -> float | None:
    if settings.get("draft_cost_aware"):
        names = ("draft_depth", "draft_top_k", "draft_total_tokens")
        same = [row for row in tuned["cost_aware"] if all(row[name] == settings[name] for name in names)]
        return same[0]["step_ms"] if same else None
    costs = costs_of(tuned, settings["draft_top_k"], settings.get("draft_active_groups"))
    if costs is None or settings["draft_total_tokens"] > len(costs.target_ms):
        return None
    return costs.step_ms(settings["draft_depth"], settings["draft_total_tokens"])


__all__ = [
    "WANTED_ERROR",
    "check_predictions",
    "costs_of",
    "drafter_of",
    "expected_acceptance_length",
    "predict_speedup",
]
