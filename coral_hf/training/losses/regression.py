"""Regression: smooth L1 between the drafter's output and the target's next feature (EAGLE eq. 1)."""

from typing import Any

import torch
from torch.nn import functional as F

from .loss_term import LossBatch, LossTerm


def regression_loss(hidden: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
    """Mean over M rows of smooth L1 between drafter output and target feature, both `[M, H]` (EAGLE eq. 1)."""
    if hidden.shape[0] == 0:
        return hidden.sum() * 0.0
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.smooth_l1_loss(hidden.to(dtype), target_features.to(dtype))


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return torch.stack([regression_loss(hidden, goals) for hidden, goals in batch.steps()])


TERM = LossTerm("regression", "regression_loss_weight", _of_batch, always=True)

__all__ = ["TERM", "regression_loss"]
