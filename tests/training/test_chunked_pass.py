"""The pass over the vocabulary and the terms that use it, against plain formulas and values computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import random_features as rows

from coral_hf import TargetAdapter
from coral_hf.training.losses.chunked_pass import chunked_pass
from coral_hf.training.losses.classification import cross_entropy
from coral_hf.training.losses.top_k import top_k_cross_entropy
from coral_hf.training.losses.total_variation import total_variation


def one_step(hidden, features, logits_fn, *comparisons, top_k=1, **options):
    """Means of one step over `[M, H]`, each with a gradient: one for each comparison, the cross-entropy unless named."""
    wanted = dict.fromkeys(comparisons or (cross_entropy,), True)
    result = chunked_pass(hidden[None], features, logits_fn, wanted, SimpleNamespace(topk=top_k), **options)
    return *(mean[0] for mean in result.means.values()), result.match[0]


def plain_classification(hidden, features, logits_fn, token_ids=None, top_k=0):
    """CE(p, q) and HASS's top-K term with full logits: the target's distribution p is a constant."""
    columns = slice(None) if token_ids is None else token_ids
    p = logits_fn(features)[..., columns].softmax(-1).detach()
    log_q = logits_fn(hidden)[..., columns].log_softmax(-1)
    loss = -(p * log_q).sum(-1).mean()
    best = p.topk(top_k, dim=-1).indices
    topk = -(p.gather(-1, best) * log_q.gather(-1, best)).sum(-1).mean()
    return loss, topk, log_q.argmax(-1) == p.argmax(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])  # plain, scaled, soft-capped
def test_classification_equals_the_full_logits_formula(family, top_k, subset, chunk_size):
    adapter = TargetAdapter(make_target(family).requires_grad_(False))
    hidden = rows(7, seed=1).requires_grad_()
    features = rows(7, seed=2)
    token_ids = torch.tensor([0, 3, 4, 17, 90, 91, 127]) if subset else None
    expected = plain_classification(hidden, features, adapter.logits, token_ids, top_k)
    options = {"top_k": top_k, "token_ids": token_ids, "chunk_size": chunk_size}
    result = one_step(hidden, features, adapter.logits, cross_entropy, top_k_cross_entropy, **options)
    assert torch.equal(result[-1], expected[-1])
    for found, value in zip(result[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(3.0 * found, hidden)
        (expected_gradient,) = torch.autograd.grad(3.0 * value, hidden, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("top_k", [1, 5])
def test_steps_together_equal_each_step_alone(top_k, subset):
    """K steps over the same rows, each with its own valid rows; the values of the others have no effect."""
    adapter = TargetAdapter(make_target("gemma3_text").requires_grad_(False))
    hidden = rows(21, seed=1).view(3, 7, -1).clone()
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 0] = valid[2, :2] = valid[2, 5] = False
    hidden[2, 1] = float("nan")
    hidden.requires_grad_()
    features, weights = rows(7, seed=2), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    token_ids = torch.tensor([0, 3, 4, 17, 90, 91, 127]) if subset else None
    wanted = {cross_entropy: True, top_k_cross_entropy: True}
    options = {"valid": valid, "token_ids": token_ids, "chunk_size": 3}
    result = chunked_pass(hidden, features, adapter.logits, wanted, SimpleNamespace(topk=top_k), **options)
    for position, each in enumerate(wanted):
        (gradient,) = torch.autograd.grad((weights * result.means[each]).sum(), hidden)
        for step in range(3):
            kept = valid[step]
            alone = hidden[step, kept].detach().requires_grad_()
            plain = plain_classification(alone, features[kept], adapter.logits, token_ids, top_k)
            (expected,) = torch.autograd.grad(weights[step] * plain[position], alone)
            torch.testing.assert_close(result.means[each][step], plain[position], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient[step, kept], expected, rtol=1e-10, atol=1e-12)
            assert torch.equal(result.match[step, kept], plain[-1])
            assert (gradient[step, ~kept] == 0).all() and not result.match[step, ~kept].any()


def test_steps_share_the_target_logits():
    adapter = TargetAdapter(make_target().requires_grad_(False))
    seen = []

    def spy(features, **kwargs):
        seen.append(features.shape[0])
        return adapter.logits(features, **kwargs)

    hidden = rows(60).view(3, 20, -1).requires_grad_()
    wanted = {cross_entropy: True, top_k_cross_entropy: True}
    result = chunked_pass(hidden, rows(20, seed=1), spy, wanted, SimpleNamespace(topk=2), chunk_size=8)
    sum(mean.sum() for mean in result.means.values()).backward()
    assert max(seen) == 8 and sum(seen) == (1 + 3) * 20


def test_classification_passes_gradcheck():
    adapter = TargetAdapter(make_target("gemma3_text").requires_grad_(False))
    hidden, features = rows(3, seed=1).requires_grad_(), rows(3, seed=2)
    assert torch.autograd.gradcheck(lambda h: one_step(h, features, adapter.logits, chunk_size=2)[0], (hidden,))


def test_classification_sends_gradients_to_the_drafter_only():
    target = make_target().requires_grad_(False)
    drafter_parameter = rows(4, seed=1).requires_grad_()
    features = rows(4, seed=2).requires_grad_()
    one_step(drafter_parameter * 2, features, TargetAdapter(target).logits)[0].backward()
    assert drafter_parameter.grad.abs().max() > 0
    assert features.grad is None
    assert all(parameter.grad is None for parameter in target.parameters())


def test_classification_never_holds_more_than_a_chunk_of_logits():
    adapter = TargetAdapter(make_target().requires_grad_(False))
    seen = []

    def spy(features, **kwargs):
        seen.append(features.shape[0])
        return adapter.logits(features, **kwargs)

    one_step(rows(100).requires_grad_(), rows(100, seed=1), spy, chunk_size=16)[0].backward()
    assert max(seen) == 16
    assert sum(seen) == 2 * 100, "each row once for p and once for q; backward computes no logits again"


def test_classification_of_bfloat16_is_computed_in_float32():
    target = make_target(dtype=torch.bfloat16).requires_grad_(False)
    logits_fn = TargetAdapter(target).logits
    hidden = rows(20, seed=1, dtype=torch.float32).requires_grad_()
    features = rows(20, seed=2, dtype=torch.float32)
    expected, _, _ = plain_classification(hidden, features, lambda x: logits_fn(x).float(), top_k=1)
    loss, _ = one_step(hidden, features.bfloat16(), logits_fn, chunk_size=8)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (gradient,), (plain,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    assert gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0) > 0.999


def test_offsets_let_sampled_tokens_stand_for_others():
    """Of four tokens with equal logits two are sampled, and one represents three: the gradient equals the full loss's."""
    target, ours = torch.tensor([[2.0, 0.5]], dtype=torch.float64), torch.tensor([[0.3, 0.9]], dtype=torch.float64)

    def full(x):  # token 0, and three tokens that share a logit
        return torch.cat([x[:, :1], x[:, 1:].expand(-1, 3)], dim=-1)

    def some(x, token_ids):
        return full(x)[:, token_ids]

    hidden, sampled = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    offsets = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    options = {"token_ids": torch.tensor([0, 2]), "logit_offsets": offsets}
    one_step(hidden, target, full)[0].backward()
    one_step(sampled, target, some, **options)[0].backward()
    torch.testing.assert_close(sampled.grad, hidden.grad)
    # token 0 is the target's best by its own logit, though the other three together outweigh a smaller lead
    close = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    assert one_step(close, target, some, **options)[1].tolist() == [True]


def test_classification_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): CE = log 2, the gradient of the logits is q - p."""
    hidden = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    features = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    loss, match = one_step(hidden, features, lambda x: x * 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert hidden.grad[0].tolist() == pytest.approx([-0.25, 0.25])
    assert match.tolist() == [True]
    topk, _ = one_step(hidden, features, lambda x: x * 1.0, top_k_cross_entropy)
    assert topk.item() == pytest.approx(0.75 * math.log(2)), "p is not renormalised over the top K"


def test_classification_without_rows_or_gradients():
    adapter = TargetAdapter(make_target())
    hidden = rows(0).requires_grad_()
    loss, match = one_step(hidden, rows(0), adapter.logits)
    loss.backward()
    assert loss.item() == 0.0 and match.shape == (0,)
    with torch.no_grad():
        loss, _ = one_step(rows(5, seed=1).requires_grad_(), rows(5), adapter.logits)
    assert not loss.requires_grad


def test_what_is_only_watched_gets_no_gradient():
    adapter = TargetAdapter(make_target().requires_grad_(False))
    hidden = rows(7, seed=1)[None].requires_grad_()
    wanted = {total_variation: True, cross_entropy: False}
    result = chunked_pass(hidden, rows(7, seed=2), adapter.logits, wanted, chunk_size=3)
    assert result.means[total_variation].requires_grad and not result.means[cross_entropy].requires_grad
