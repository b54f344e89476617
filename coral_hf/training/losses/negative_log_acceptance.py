"""Negative log acceptance: total variation whose gradient grows as the overlap shrinks."""

from typing import Any

import torch

from .chunked_pass import Chunk
from .loss_term import LossBatch, LossTerm
from .total_variation import total_variation


def negative_log_acceptance(chunk: Chunk, args: Any, gradient: torch.Tensor | None) -> torch.Tensor:
    """-log alpha per row, where alpha = sum min(p, q) is the chance of acceptance (LK losses, arXiv 2602.23881).

    Its gradient is that of the total variation divided by alpha. It therefore also trains a drafter with little overlap.
    """
    # a sum of minima, because 1 - TV would round a small alpha to 0
    alpha = torch.minimum(chunk.p, chunk.q).sum(dim=-1).clamp(min=torch.finfo(chunk.p.dtype).tiny)
    if gradient is not None:
        total_variation(chunk, args, gradient)
        gradient /= alpha[:, None]
    return -alpha.log()


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return batch.compared[negative_log_acceptance]


TERM = LossTerm("nla", "nla_loss_weight", _of_batch, comparisons=(negative_log_acceptance,))

__all__ = ["TERM", "negative_log_acceptance"]
