"""Reverse KL: the divergence from the drafter's distribution q to the target's p, which seeks p's modes."""

from typing import Any

import torch

from .chunked_pass import Chunk
from .loss_term import LossBatch, LossTerm


def reverse_kl(chunk: Chunk, args: Any, gradient: torch.Tensor | None) -> torch.Tensor:
    """KL(q, p) = sum q (log q - log p) per row; its gradient with respect to the logits is q (log q - log p - KL).

    If p underflows, the smallest normal number of its dtype is used.
    """
    log_ratio = chunk.logits - chunk.normaliser[:, None]
    log_ratio -= chunk.p.clamp(min=torch.finfo(chunk.p.dtype).tiny).log()
    divergence = (chunk.q * log_ratio).sum(dim=-1)
    if gradient is not None:
        torch.mul(chunk.q, log_ratio.sub_(divergence[:, None]), out=gradient)
    return divergence


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return batch.compared[reverse_kl]


TERM = LossTerm("reverse_kl", "reverse_kl_loss_weight", _of_batch, comparisons=(reverse_kl,))

__all__ = ["TERM", "reverse_kl"]
