"""Attention in blocks against one plain softmax over all keys, in float64 with its gradients."""

import pytest
import torch

from coral_hf.drafter import rollout_attention as module


def inputs(dtype=torch.float64, length=11):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    batch, kv_heads, groups, own, dim = 2, 2, 3, 2, 4
    rows = torch.arange(length)
    documents = torch.stack([rows // 5, rows // 20])  # the first sequence is packed
    mask = (documents[:, :, None] == documents[:, None, :]) & (rows[:, None] - 2 >= rows)
    columns, chain = (batch, kv_heads, length, dim), (batch, kv_heads, length, own, dim)
    tensors = [random(batch, kv_heads, groups, length, dim)]
    tensors += [random(*columns), random(*columns), random(*chain), random(*chain)]
    return tensors, mask[:, None]


def plain(query, key, value, chain_keys, chain_values, mask):
    shared = torch.einsum("bgnsd,bgcd->bgnsc", query, key).masked_fill(~mask[:, :, None], float("-inf"))
    own = torch.einsum("bgnsd,bgsld->bgnsl", query, chain_keys)
    weights = torch.cat([shared, own], dim=-1).softmax(dim=-1)
    length = key.shape[2]
    return torch.einsum("bgnsc,bgcd->bgnsd", weights[..., :length], value) + torch.einsum(
        "bgnsl,bgsld->bgnsd", weights[..., length:], chain_values
    )


@pytest.mark.parametrize("block", [1, 4, 11, 128])
def test_blocks_equal_one_softmax(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    tensors, mask = inputs()
    expected, found = plain(*tensors, mask), module.rollout_attention(*tensors, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_close_and_keeps_no_scores():
    tensors, mask = inputs(torch.bfloat16, length=64)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = module.rollout_attention(*tensors, mask)
    assert found.dtype == torch.bfloat16
    assert not any(x.is_floating_point() and x.shape[-2:] == (64, 64) for x in saved)
    expected = plain(*exact, mask)
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)
    gradients = torch.autograd.grad(found.float().square().sum(), tensors)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert torch.cosine_similarity(mine.double().flatten(), theirs.flatten(), dim=0) > 0.999
