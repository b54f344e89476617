"""Top-K distillation: cross-entropy over the target's most likely tokens (HASS eq. 5)."""

from typing import Any

import torch

from .chunked_pass import Chunk
from .loss_term import LossBatch, LossTerm


def top_k_cross_entropy(chunk: Chunk, args: Any, gradient: torch.Tensor | None) -> torch.Tensor:
    """-sum over the target's `args.topk` best tokens of p log q per row, p not renormalised.

    Its gradient with respect to the logits is (sum of those p) q - p 1[x is one of them].
    """
    mass, best = chunk.target_top(args.topk)
    log_q = chunk.logits.gather(-1, best) - chunk.normaliser[:, None]
    if gradient is not None:
        torch.mul(chunk.q, mass.sum(dim=-1, keepdim=True), out=gradient).scatter_add_(-1, best, -mass)
    return -(mass * log_q).sum(dim=-1)


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return batch.compared[top_k_cross_entropy]


TERM = LossTerm("topk", "topk_loss_weight", _of_batch, settings=("topk",), comparisons=(top_k_cross_entropy,))

__all__ = ["TERM", "top_k_cross_entropy"]
