"""Attention of later rollout steps in blocks of rows, without storing the full matrix of scores."""

from contextlib import AbstractContextManager, nullcontext

import torch


# Rows per block: needs O(block * S) memory instead of O(S^2), and fits into a CPU's caches.
BLOCK_ROWS = 128


def rollout_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chain_keys: torch.Tensor,
    chain_values: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Softmax attention over columns that all rows share, and over L additional keys for each row.

    `scaled_dot_product_attention` could only handle keys of single rows with a mask over all keys, which means K full matrices
    of scores. Here, columns after a block of rows are not computed, and the backward pass recomputes the scores of a block.

    Args:
        query (`torch.Tensor` of shape `[B, g, n, S, d]`): scaled queries; n queries share a key.
        key, value (`torch.Tensor` of shape `[B, g, S, d]`): the shared columns.
        chain_keys, chain_values (`torch.Tensor` of shape `[B, g, S, L, d]`): each row's own keys and values.
        mask (`torch.BoolTensor` of shape `[B, 1, S, S]`): the shared columns that a row sees, none of them after it.

    Returns:
        `torch.Tensor` of shape `[B, g, n, S, d]` in the query's dtype.
    """
    return _RolloutAttention.apply(query, key, value, chain_keys, chain_values, mask)


def _scores(query, key, chain_keys, mask, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a block of C rows: `[B, g, n, C, end]` over the shared columns, `[B, g, n, C, L]` over their own keys."""
    batch, kv_heads, groups, _, dim = query.shape
    block = query[:, :, :, rows]  # [B, g, n, C, d]
    flat = block.reshape(batch, kv_heads, -1, dim)  # [B, g, n C, d]
    shared = (flat @ key[:, :, : rows.stop].transpose(-1, -2)).view(batch, kv_heads, groups, -1, rows.stop)
    shared = shared.to(dtype).masked_fill_(~mask[:, :, None, rows, : rows.stop], float("-inf"))
    own = (block.unsqueeze(-2) * chain_keys[:, :, None, rows]).sum(-1, dtype=dtype)
    return shared, own


def _without_autocast(device: torch.device) -> AbstractContextManager:
    # the meta device, which is used for estimates, does not support autocast
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class _RolloutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, chain_keys, chain_values, mask):
        batch, kv_heads, groups, length, dim = query.shape
        # softmax in float32 at least, as every attention implementation does
        dtype = torch.promote_types(query.dtype, torch.float32)
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        normaliser = query.new_empty(batch, kv_heads, groups, length, 1, dtype=dtype)
        with _without_autocast(query.device):
            for start in range(0, length, BLOCK_ROWS):
                rows = slice(start, min(start + BLOCK_ROWS, length))
                shared, own = _scores(query, key, chain_keys, mask, rows, dtype)
                largest = torch.maximum(shared.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
                shared, own = shared.sub_(largest).exp_(), own.sub_(largest).exp_()
                total = shared.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
                normaliser[:, :, :, rows] = largest + total.log()
                weights = (shared.div_(total)).to(value.dtype).view(batch, kv_heads, -1, rows.stop)
                part = (weights @ value[:, :, : rows.stop]).view(batch, kv_heads, groups, -1, dim)
                own = own.div_(total).to(value.dtype)
                attended[:, :, :, rows] = part + (own.unsqueeze(-1) * chain_values[:, :, None, rows]).sum(-2)
        ctx.save_for_backward(query, key, value, chain_keys, chain_values, mask, attended, normaliser)
        return attended

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, chain_keys, chain_values, mask, attended, normaliser = ctx.saved_tensors
        batch, kv_heads, _, length, dim = query.shape
        dtype = normaliser.dtype
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
        grad_chain_keys, grad_chain_values = torch.empty_like(chain_keys), torch.empty_like(chain_values)
        with _without_autocast(query.device):
            for start in range(0, length, BLOCK_ROWS):
                rows = slice(start, min(start + BLOCK_ROWS, length))
                shared, own = _scores(query, key, chain_keys, mask, rows, dtype)
                level = normaliser[:, :, :, rows]
                shared, own = shared.sub_(level).exp_(), own.sub_(level).exp_()  # the weights
                block, grad = query[:, :, :, rows], grad_output[:, :, :, rows]  # [B, g, n, C, d]
                flat_grad = grad.reshape(batch, kv_heads, -1, dim)
                flat_weights = shared.to(value.dtype).view(batch, kv_heads, -1, rows.stop)
                grad_value[:, :, : rows.stop] += flat_weights.transpose(-1, -2) @ flat_grad
                grad_chain_values[:, :, rows] = (own.to(value.dtype).unsqueeze(-1) * grad.unsqueeze(-2)).sum(2)
                # softmax backward: weight * (gradient of the weight - their weighted mean)
                mean = (grad * attended[:, :, :, rows]).sum(-1, keepdim=True, dtype=dtype)
                change = flat_grad @ value[:, :, : rows.stop].transpose(-1, -2)
                change = change.view(shared.shape).to(dtype).sub_(mean).mul_(shared)
                own_change = (grad.unsqueeze(-2) * chain_values[:, :, None, rows]).sum(-1, dtype=dtype)
                own_change = own_change.sub_(mean).mul_(own).to(query.dtype).unsqueeze(-1)  # [B, g, n, C, L, 1]
                change = change.to(query.dtype).view(batch, kv_heads, -1, rows.stop)
                part = (change @ key[:, :, : rows.stop]).view(block.shape)
                grad_query[:, :, :, rows] = part + (own_change * chain_keys[:, :, None, rows]).sum(-2)
                flat = block.reshape(batch, kv_heads, -1, dim)
                grad_key[:, :, : rows.stop] += change.transpose(-1, -2) @ flat
                grad_chain_keys[:, :, rows] = (own_change * block.unsqueeze(-2)).sum(2)
        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            grad_chain_keys,
            grad_chain_values,
            None,
        )


__all__ = ["rollout_attention"]
