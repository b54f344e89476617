"""The losses against plain formulas, slow loops and values computed by hand."""

import math

import pytest
import torch
from helpers.tiny_models import make_target
from torch.nn import functional as F

from coral_hf import TargetAdapter
from coral_hf.training.losses.losses import chunked_classification_loss, csra_loss, regression_loss


def rows(count: int, size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Classification ------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])  # plain, scaled, soft-capped
def test_classification_equals_the_full_logits_formula(family, top_k, subset, chunk_size):
    adapter = TargetAdapter(make_target(family).requires_grad_(False))
    hidden = rows(7, seed=1).requires_grad_()
    features = rows(7, seed=2)
    token_ids = torch.tensor([0, 3, 4, 17, 90, 91, 127]) if subset else None
    weight = 0.7 if top_k else 0.0
    expected, expected_topk, expected_match = plain_classification(hidden, features, adapter.logits, token_ids, top_k)
    (expected_gradient,) = torch.autograd.grad(3.0 * (expected + weight * expected_topk), hidden)

    result = chunked_classification_loss(
        hidden,
        features,
        adapter.logits,
        token_ids=token_ids,
        top_k=top_k,
        top_k_weight=weight,
        chunk_size=chunk_size,
    )
    (gradient,) = torch.autograd.grad(3.0 * result.loss, hidden)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.topk_loss, expected_topk, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(result.match, expected_match)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("top_k", [0, 5])
def test_steps_together_equal_each_step_alone(top_k, subset):
    """K steps over the same rows, each with its own valid ones; what stands in the others reaches nothing."""
    adapter = TargetAdapter(make_target("gemma3_text").requires_grad_(False))
    hidden = rows(21, seed=1).view(3, 7, -1).clone()
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 0] = valid[2, :2] = valid[2, 5] = False
    hidden[2, 1] = float("nan")
    hidden.requires_grad_()
    features, weights = rows(7, seed=2), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    token_ids = torch.tensor([0, 3, 4, 17, 90, 91, 127]) if subset else None
    options = {"token_ids": token_ids, "top_k": top_k, "top_k_weight": 0.7 if top_k else 0.0, "chunk_size": 3}
    result = chunked_classification_loss(hidden, features, adapter.logits, valid=valid, **options)
    (gradient,) = torch.autograd.grad((weights * result.loss).sum(), hidden)
    for step in range(3):
        kept = valid[step]
        alone = hidden[step, kept].detach().requires_grad_()
        loss, topk, match = plain_classification(alone, features[kept], adapter.logits, token_ids, top_k)
        (expected,) = torch.autograd.grad(weights[step] * (loss + options["top_k_weight"] * topk), alone)
        torch.testing.assert_close(result.loss[step], loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.topk_loss[step], topk, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[step, kept], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(result.match[step, kept], match)
        assert (gradient[step, ~kept] == 0).all() and not result.match[step, ~kept].any()


def test_steps_share_the_target_logits():
    adapter = TargetAdapter(make_target().requires_grad_(False))
    seen = []

    def spy(features, **kwargs):
        seen.append(features.shape[0])
        return adapter.logits(features, **kwargs)

    hidden = rows(60).view(3, 20, -1).requires_grad_()
    chunked_classification_loss(hidden, rows(20, seed=1), spy, chunk_size=8).loss.sum().backward()
    assert max(seen) == 8 and sum(seen) == (1 + 3) * 20


def test_classification_passes_gradcheck():
    adapter = TargetAdapter(make_target("gemma3_text").requires_grad_(False))
    hidden, features = rows(3, seed=1).requires_grad_(), rows(3, seed=2)
    assert torch.autograd.gradcheck(
        lambda h: chunked_classification_loss(h, features, adapter.logits, chunk_size=2).loss, (hidden,)
    )


def test_classification_sends_gradients_to_the_drafter_only():
    target = make_target().requires_grad_(False)
    drafter_parameter = rows(4, seed=1).requires_grad_()
    features = rows(4, seed=2).requires_grad_()
    chunked_classification_loss(drafter_parameter * 2, features, TargetAdapter(target).logits).loss.backward()
    assert drafter_parameter.grad.abs().max() > 0
    assert features.grad is None
    assert all(parameter.grad is None for parameter in target.parameters())


def test_classification_never_holds_more_than_a_chunk_of_logits():
    adapter = TargetAdapter(make_target().requires_grad_(False))
    seen = []

    def spy(features, **kwargs):
        seen.append(features.shape[0])
        return adapter.logits(features, **kwargs)

    chunked_classification_loss(rows(100).requires_grad_(), rows(100, seed=1), spy, chunk_size=16).loss.backward()
    assert max(seen) == 16
    assert sum(seen) == 2 * 100, "each row once for p and once for q; backward computes no logits again"


def test_classification_of_bfloat16_is_computed_in_float32():
    target = make_target(dtype=torch.bfloat16).requires_grad_(False)
    logits_fn = TargetAdapter(target).logits
    hidden = rows(20, seed=1, dtype=torch.float32).requires_grad_()
    features = rows(20, seed=2, dtype=torch.float32)
    expected, _, _ = plain_classification(hidden, features, lambda x: logits_fn(x).float(), top_k=1)
    result = chunked_classification_loss(hidden, features.bfloat16(), logits_fn, chunk_size=8)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-5)
    (gradient,), (plain,) = torch.autograd.grad(result.loss, hidden), torch.autograd.grad(expected, hidden)
    assert gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0) > 0.999


def test_offsets_let_sampled_tokens_stand_for_others():
    """Two of four tokens with equal logits, one of them standing for three: the loss's gradient is the full one's."""
    target, ours = torch.tensor([[2.0, 0.5]], dtype=torch.float64), torch.tensor([[0.3, 0.9]], dtype=torch.float64)

    def full(x):  # token 0, and three tokens that share a logit
        return torch.cat([x[:, :1], x[:, 1:].expand(-1, 3)], dim=-1)

    def some(x, token_ids):
        return full(x)[:, token_ids]

    hidden, sampled = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    chunked_classification_loss(hidden, target, full).loss.backward()
    result = chunked_classification_loss(
        sampled,
        target,
        some,
        token_ids=torch.tensor([0, 2]),
        logit_offsets=torch.tensor([0.0, math.log(3.0)], dtype=torch.float64),
    )
    result.loss.backward()
    torch.testing.assert_close(sampled.grad, hidden.grad)
    # token 0 is the target's best by its own logit, though the other three together outweigh a smaller lead
    close = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    matched = chunked_classification_loss(
        close,
        target,
        some,
        token_ids=torch.tensor([0, 2]),
        logit_offsets=torch.tensor([0.0, math.log(3.0)], dtype=torch.float64),
    )
    assert matched.match.tolist() == [True]


def test_classification_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): CE = log 2, the gradient of the logits is q - p."""
    hidden = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    features = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    result = chunked_classification_loss(hidden, features, lambda x: x * 1.0, top_k=1, top_k_weight=0.0)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(2))
    assert hidden.grad[0].tolist() == pytest.approx([-0.25, 0.25])
    assert result.match.tolist() == [True]
    topk = chunked_classification_loss(hidden, features, lambda x: x * 1.0, top_k=1, top_k_weight=1.0)
    assert topk.topk_loss.item() == pytest.approx(0.75 * math.log(2)), "p is not renormalised over the top K"


def test_classification_without_rows_or_gradients():
    adapter = TargetAdapter(make_target())
    hidden = rows(0).requires_grad_()
    empty = chunked_classification_loss(hidden, rows(0), adapter.logits)
    empty.loss.backward()
    assert empty.loss.item() == 0.0 and empty.match.shape == (0,)
    with torch.no_grad():
        result = chunked_classification_loss(rows(5, seed=1).requires_grad_(), rows(5), adapter.logits)
    assert not result.loss.requires_grad


# Regression ----------------------------------------------------------------------------------------------------


def test_regression_is_smooth_l1_by_hand():
    """|d| < 1: d^2 / 2, else |d| - 1/2; mean over rows and dimensions."""
    hidden = torch.tensor([[0.5, 3.0], [0.0, -2.0]], dtype=torch.float64, requires_grad=True)
    loss = regression_loss(hidden, torch.zeros(2, 2, dtype=torch.float64))
    assert loss.item() == pytest.approx((0.125 + 2.5 + 0.0 + 1.5) / 4)
    loss.backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([0.125, 0.25, 0.0, -0.25])


def test_regression_of_nothing_and_of_bfloat16():
    assert regression_loss(rows(0), rows(0)).item() == 0.0
    assert regression_loss(rows(3).bfloat16(), rows(3, seed=1).bfloat16()).dtype == torch.float32


# CSRA ----------------------------------------------------------------------------------------------------------


def slow_csra(steps, valid, temperature, target_features=None):
    """method.md's formula as loops over (k, i), its positives and its denominator."""
    z = {
        (k, i): F.normalize(steps[k, i], dim=0) for k in range(len(steps)) for i in range(len(steps[0])) if valid[k, i]
    }
    if target_features is not None:
        z |= {(len(steps), i): F.normalize(feature, dim=0) for i, feature in enumerate(target_features.detach())}
    anchors = []
    for k, i in z:
        others = [pair for pair in z if pair != (k, i)]
        denominator = sum(torch.exp(z[k, i] @ z[pair] / temperature) for pair in others)
        terms = [
            torch.log(torch.exp(z[k, i] @ z[other, j] / temperature) / denominator)
            for other, j in others
            if j == i and other != k
        ]
        if terms:
            anchors.append(sum(terms) / len(terms))
    return -sum(anchors) / len(anchors)


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("num_steps", [2, 3])
@pytest.mark.parametrize("gaps", [False, True])
def test_csra_equals_the_slow_loops(gaps, num_steps, with_target):
    steps = rows(num_steps * 5, 6).view(num_steps, 5, 6).requires_grad_()
    features = rows(5, 6, seed=1).requires_grad_() if with_target else None
    valid = torch.ones(num_steps, 5, dtype=torch.bool)
    if gaps:
        valid[1, 0] = False  # with K = 2 and no target view, position 0 is a negative only
        valid[-1, 3] = False
        valid[:, 4] = False
    expected = slow_csra(steps, valid, 0.5, features)
    loss = csra_loss(steps, valid, temperature=0.5, target_features=features)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (slow_gradient,) = torch.autograd.grad(loss, steps), torch.autograd.grad(expected, steps)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-10, atol=1e-12)
    assert (gradient[~valid] == 0).all()
    if with_target:
        assert torch.autograd.grad(
            csra_loss(steps, valid, temperature=0.5, target_features=features), features, allow_unused=True
        ) == (None,)


def test_csra_by_hand():
    """Two positions whose steps agree and are orthogonal: every anchor has cosine 1 once and 0 twice."""
    steps = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 0.5]]], dtype=torch.float64)
    valid = torch.ones(2, 2, dtype=torch.bool)
    assert csra_loss(steps, valid, temperature=1.0).item() == pytest.approx(math.log(1 + 2 * math.exp(-1)))
    assert csra_loss(steps, valid, temperature=0.5).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_csra_of_one_step_needs_the_target_view():
    steps, valid = rows(4, 6)[None], torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"num_steps >= 2, set csra_include_target=True, or csra_weight=0"):
        csra_loss(steps, valid, temperature=0.07)
    loss = csra_loss(steps, valid, temperature=0.07, target_features=rows(4, 6, seed=1))
    torch.testing.assert_close(loss, slow_csra(steps, valid, 0.07, rows(4, 6, seed=1)))


def test_csra_without_a_pair_is_zero_and_differentiable():
    steps = rows(6, 4).view(2, 3, 4).requires_grad_()
    for valid in (torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[True, True, False], [False, False, True]])):
        loss = csra_loss(steps, valid, temperature=0.07)
        loss.backward()
        assert loss.item() == 0.0 and steps.grad.abs().max() == 0
    none = csra_loss(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), temperature=0.07)
    assert none.item() == 0.0


def test_csra_samples_whole_positions():
    steps, valid = rows(3 * 9, 6).view(3, 9, 6), torch.ones(3, 9, dtype=torch.bool)
    valid[:, 2] = False
    features = rows(9, 6, seed=1)
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(4))[:4]
    loss = csra_loss(
        steps,
        valid,
        temperature=0.3,
        target_features=features,
        max_positions=4,
        generator=torch.Generator().manual_seed(4),
    )
    torch.testing.assert_close(loss, slow_csra(steps[:, drawn], valid[:, drawn], 0.3, features[drawn]))
    everything = csra_loss(steps, valid, temperature=0.3, target_features=features, max_positions=9)
    torch.testing.assert_close(everything, slow_csra(steps, valid, 0.3, features))


def test_csra_of_bfloat16_is_computed_in_float32():
    steps, valid = rows(3 * 9, 6).view(3, 9, 6), torch.ones(3, 9, dtype=torch.bool)
    loss = csra_loss(steps.bfloat16(), valid, temperature=0.07, target_features=rows(9, 6, seed=1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), slow_csra(steps, valid, 0.07, rows(9, 6, seed=1)), rtol=0.02, atol=0.02)
