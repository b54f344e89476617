"""The LK hybrid: forward KL while the overlap is small, total variation once it is large (arXiv 2602.23881)."""

from typing import Any

import torch

from .chunked_pass import Chunk
from .classification import cross_entropy
from .loss_term import LossBatch, LossTerm
from .total_variation import total_variation


# from the paper: how fast the share of the divergence decreases as the overlap grows
DECAY = 3.0


def forward_kl(chunk: Chunk, args: Any, gradient: torch.Tensor | None) -> torch.Tensor:
    """KL(p, q) per row: the cross-entropy minus the target's entropy, with the cross-entropy's gradient."""
    return cross_entropy(chunk, args, gradient) - chunk.target_entropy()


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    """lambda KL + (1 - lambda) TV of each step, with lambda = exp(-3 alpha) and alpha the step's mean overlap, detached.

    Each rollout step of each batch has its own lambda.
    """
    divergence, variation = batch.compared[forward_kl], batch.compared[total_variation]
    share = torch.exp(-DECAY * (1 - variation.detach()))
    return share * divergence + (1 - share) * variation


TERM = LossTerm("lk_hybrid", "lk_hybrid_loss_weight", _of_batch, comparisons=(forward_kl, total_variation))

__all__ = ["DECAY", "TERM", "forward_kl"]
