"""CSRA against slow loops and values computed by hand."""

import math

import pytest
import torch
from helpers.tiny_trainings import random_features as rows
from torch.nn import functional as F

from coral_hf.training.losses.csra import csra_loss


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
