"""Attention of a draft tree's nodes as matrix products. Prefix and tree are separate, and heads are not repeated."""

import torch
from torch.nn import functional as F


# PyTorch kernels that attend without a mask and also return the log-sum-exp of the scores, by device.
_KERNELS = {
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
}
HALF = (torch.bfloat16, torch.float16)


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    among: torch.Tensor,
    scaling: float,
    edge: torch.Tensor | None = None,
) -> torch.Tensor:
    """One softmax over prefix and tree. The queries of all heads of a group are rows of one product.

    Args:
        query (`torch.Tensor` of shape `[B, heads, N, d]`): queries of the nodes.
        key, value (`torch.Tensor` of shape `[B, kv_heads, P + N, d]`): those of the prefix, which all nodes see, then of the
            nodes.
        among (`torch.Tensor` of shape `[B, 1, N, N]` or `[1, 1, N, N]`): added to the scores between nodes.
        scaling (`float`)
        edge (`torch.Tensor` of shape `[1, 1, N, E]`, *optional*): added to the scores of the first E prefix tokens, which
            are at the edge of a window.

    Returns:
        `torch.Tensor` of shape `[B, N, heads, d]`.
    """
    batch, heads, nodes, dim = query.shape
    kv_heads, length = key.shape[1:3]
    rows = query.reshape(batch * kv_heads, -1, dim)  # [B * kv, group * N, d]
    keys, values = key.reshape(-1, length, dim), value.reshape(-1, length, value.shape[-1])
    scores = torch.baddbmm(rows.new_empty(()), rows, keys.transpose(1, 2), beta=0, alpha=scaling)
    by_node = scores.view(batch, heads, nodes, length)
    by_node[..., length - nodes :].add_(among)
    if edge is not None:
        by_node[..., : edge.shape[-1]].add_(edge)
    attended = scores.softmax(dim=-1).bmm(values)  # [B * kv, group * N, d]
    return attended.view(batch, heads, nodes, -1).transpose(1, 2)


def joined_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, among: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The prefix with a kernel without a mask and the tree with small products, joined by their log-sum-exps.

    Args and returns as [`softmax_attention`].
    """
    batch, heads, nodes, dim = query.shape
    kv_heads, length = key.shape[1:3]
    rows = query.reshape(batch, kv_heads, -1, dim)  # [B, kv, group * N, d]
    prefix = length - nodes
    kernel = _KERNELS[query.device.type]
    far, far_sum = kernel(rows, key[:, :, :prefix], value[:, :, :prefix], scale=scaling)[:2]
    scores = (rows @ key[:, :, prefix:].transpose(2, 3)).float() * scaling  # [B, kv, group * N, N]
    scores = scores.view(batch, heads, nodes, nodes) + among
    near_sum = scores.logsumexp(dim=-1, keepdim=True)  # [B, heads, N, 1]
    weights = (scores - near_sum).exp().to(value.dtype).view(batch, kv_heads, -1, nodes)
    near = weights @ value[:, :, prefix:]  # [B, kv, group * N, d]
    share = (far_sum.reshape(batch, heads, nodes, 1) - near_sum).sigmoid()
    far, near = far.reshape(batch, heads, nodes, -1), near.view(batch, heads, nodes, -1)
    return torch.lerp(near, far, share.to(near.dtype)).transpose(1, 2)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """sdpa with a mask over all keys, without repeating heads, because the CPU kernel supports groups.

    Args:
        query (`torch.Tensor` of shape `[B, heads, N, d]`), key, value (`torch.Tensor` of shape `[B, kv_heads, L, d]`)
        mask (`torch.Tensor` of shape `[B, 1, N, L]`): added to the scores.
        scaling (`float`)

    Returns:
        `torch.Tensor` of shape `[B, N, heads, d]`.
    """
    attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2)


__all__ = ["HALF", "joined_attention", "masked_attention", "softmax_attention"]
