"""Total variation: one minus the overlap of p and q, which is the chance that a drafted token is accepted."""

from typing import Any

import torch

from .chunked_pass import Chunk
from .loss_term import LossBatch, LossTerm


def total_variation(chunk: Chunk, args: Any, gradient: torch.Tensor | None) -> torch.Tensor:
    """TV(p, q) = sum |q - p| / 2 = 1 - alpha per row, where alpha = sum min(p, q) (LK losses, arXiv 2602.23881).

    Its gradient with respect to the logits is q (s - sum q s) with s = sign(q - p) / 2. It vanishes with the overlap.
    """
    difference = chunk.q - chunk.p
    value = difference.abs().sum(dim=-1) / 2
    if gradient is not None:
        sign = difference.sign_().div_(2)
        torch.mul(chunk.q, sign - (chunk.q * sign).sum(dim=-1, keepdim=True), out=gradient)
    return value


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return batch.compared[total_variation]


TERM = LossTerm("tv", "tv_loss_weight", _of_batch, comparisons=(total_variation,))

__all__ = ["TERM", "total_variation"]
