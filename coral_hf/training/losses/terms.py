"""The list of loss terms. Their sum, the log, the learning curve and the checks of settings follow from it."""

from typing import Any

import torch

from . import (
    classification,
    csra,
    lk_hybrid,
    negative_log_acceptance,
    regression,
    reverse_kl,
    top_k,
    total_variation,
)
from .chunked_pass import Comparison
from .loss_term import LossBatch, LossTerm


TERMS: tuple[LossTerm, ...] = (
    classification.TERM,
    regression.TERM,
    top_k.TERM,
    reverse_kl.TERM,
    total_variation.TERM,
    negative_log_acceptance.TERM,
    lk_hybrid.TERM,
    csra.TERM,
)


def comparisons(args: Any) -> dict[Comparison, bool]:
    """The comparisons that these arguments need, and whether each needs a gradient."""
    found: dict[Comparison, bool] = {}
    for term in TERMS:
        weighted = bool(getattr(args, term.weight))
        if weighted or term.always:
            for comparison in term.comparisons:
                found[comparison] = found.get(comparison, False) or weighted
    return found


def weighted_sum(
    batch: LossBatch, args: Any, share: torch.Tensor | float
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor | int]]]:
    """The loss of a batch, and its values for the log.

    Args:
        batch ([`LossBatch`]): a batch with the comparisons that [`comparisons`] names.
        args ([`CoralTrainingArguments`])
        share (`torch.Tensor` or `float`): the share of this batch's rows in all rows of the optimizer step. Every term is
            a mean over rows. Weighting it by the share makes gradient accumulation exact.

    Returns:
        `tuple`: a scalar, and `{name: (mean, rows)}`.
    """
    steps, rows = batch.valid.shape
    counts = batch.valid.sum(dim=-1)  # [K]
    decay = args.step_decay ** torch.arange(steps, device=counts.device)  # on the device, to avoid a transfer
    of_steps, across = torch.zeros(steps, device=counts.device), torch.zeros((), device=counts.device)
    shown: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = {}
    for term in TERMS:
        weight = getattr(args, term.weight)
        if not (weight or term.always) or (term.across_steps and steps == 1):
            continue
        loss = term.function(batch, args)
        if term.across_steps:
            across = across + weight * share * loss
            shown[term.name] = loss, rows
            continue
        shown |= {f"{term.name}_{step}": pair for step, pair in enumerate(zip(loss, counts, strict=True), start=1)}
        if weight:
            of_steps = of_steps + weight * loss
    return (decay * (share * counts / max(rows, 1)) * of_steps).sum() + across, shown


__all__ = ["TERMS", "comparisons", "weighted_sum"]
