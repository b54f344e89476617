"""Classification: cross-entropy of the drafter's distribution q to the target's p (CORAL eq. 2)."""

from typing import Any

import torch

from .chunked_pass import Chunk
from .loss_term import LossBatch, LossTerm


def cross_entropy(chunk: Chunk, args: Any, gradient: torch.Tensor | None) -> torch.Tensor:
    """CE(p, q) per row; its gradient with respect to the logits is q - p."""
    if gradient is not None:
        torch.sub(chunk.q, chunk.p, out=gradient)
    return chunk.cross_entropy


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return batch.compared[cross_entropy]


TERM = LossTerm("classification", "classification_loss_weight", _of_batch, comparisons=(cross_entropy,), always=True)

__all__ = ["TERM", "cross_entropy"]
