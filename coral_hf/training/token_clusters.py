"""Clusters the LM head's rows for a router: the ids of each group, and the router's initial weights."""

from itertools import pairwise
from typing import Any

import torch

from ..drafter.draft_head import LMHeadRouter


FREQUENCY_BANDS = (16, 4)  # the V/16 and V/4 most frequent ids are clustered separately
POWER_STEPS = 8


def cluster_tokens(weight: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """An order of the vocabulary in which every `size` consecutive ids have similar rows and about equal frequency.

    Within each frequency band, the rows are repeatedly halved along their principal direction until `size` are left. All
    groups except the last are full. The method is ours.

    Args:
        weight (`torch.Tensor` of shape `[V, H]`): the target's LM head.
        counts (`torch.Tensor` of shape `[V]`): how often each id occurs in responses.
        size (`int`): ids per group.

    Returns:
        `torch.LongTensor` of shape `[V]`: a permutation.
    """
    vocab_size = len(weight)
    weight = weight.float()
    by_frequency = counts.argsort(descending=True, stable=True)
    edges = [0, *(vocab_size // share // size * size for share in FREQUENCY_BANDS), vocab_size]
    generator = torch.Generator().manual_seed(0)
    bands = [by_frequency[start:end] for start, end in pairwise(edges)]
    return torch.cat([part for band in bands for part in _halve(weight, band, size, generator)])


def _halve(weight: torch.Tensor, ids: torch.Tensor, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    if len(ids) <= size:
        return [ids]
    rows = weight[ids]
    rows = rows - rows.mean(0)
    direction = torch.randn(rows.shape[1], generator=generator)
    for _ in range(POWER_STEPS):
        direction = torch.nn.functional.normalize(rows.T @ (rows @ direction), dim=0)
    ids = ids[(rows @ direction).argsort(stable=True)]
    half = max(1, round(len(ids) / size / 2)) * size
    return _halve(weight, ids[:half], size, generator) + _halve(weight, ids[half:], size, generator)


@torch.no_grad()
def start_from_centroids(router: LMHeadRouter, adapter: Any, counts: torch.Tensor) -> None:
    """Clusters the target's head for a router and initialises its MLP with the groups' mean rows. The method is ours.

    Because silu(x) - silu(-x) = x, half of the units and their mirror images compute a linear map. Here, it is the best
    approximation of the groups' mean rows of that rank. The bias is the log of a group's share of the responses.

    Args:
        router ([`LMHeadRouter`]): a clustered router, changed in place.
        adapter ([`TargetAdapter`])
        counts (`torch.Tensor` of shape `[V]`): how often each id occurs in responses.
    """
    weight = adapter.head_rows(torch.arange(adapter.vocab_size))[0].cpu().float()
    counts = counts.cpu()
    order: Any = router.token_order
    order.copy_(cluster_tokens(weight, counts, router.group_size))
    scale = adapter.transform_logits(torch.ones(())).item()  # soft-capping does not change small logits
    device = order.device
    sizes = router.group_mass(torch.ones(router.vocab_size, device=device)).cpu()
    means = router.in_order(weight.T.contiguous().to(device)).sum(-1).T.cpu() / sizes[:, None] * scale  # [G, H]
    left, values, right = torch.linalg.svd(means, full_matrices=False)
    rank = min(router.up_proj.out_features // 2, len(values))
    up, down = right[:rank], left[:, :rank] * values[:rank]
    shares = router.group_mass(counts.to(device) + 0.1 / router.group_size).cpu()
    for parameter in (router.up_proj.weight, router.up_proj.bias, router.down_proj.weight):
        parameter.zero_()
    router.up_proj.weight[: 2 * rank].copy_(torch.cat([up, -up]))
    router.down_proj.weight[:, : 2 * rank].copy_(torch.cat([down, -down], dim=1))
    router.down_proj.bias.copy_((shares / shares.sum()).log())


__all__ = ["cluster_tokens", "start_from_centroids"]
