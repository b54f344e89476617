"""Reverse KL, total variation, negative log acceptance and the LK hybrid, against plain formulas and values by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import logged, make_args, make_trainer
from helpers.tiny_trainings import random_features as rows

from coral_hf import TargetAdapter
from coral_hf.training.losses.chunked_pass import chunked_pass
from coral_hf.training.losses.lk_hybrid import TERM as LK_HYBRID
from coral_hf.training.losses.lk_hybrid import forward_kl
from coral_hf.training.losses.loss_term import LossBatch
from coral_hf.training.losses.negative_log_acceptance import negative_log_acceptance
from coral_hf.training.losses.reverse_kl import reverse_kl
from coral_hf.training.losses.total_variation import total_variation


def plain_reverse_kl(p, q):
    return (q * (q.log() - p.log())).sum(-1)


def plain_forward_kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def plain_total_variation(p, q):
    return (p - q).abs().sum(-1) / 2


def plain_negative_log_acceptance(p, q):
    return -torch.minimum(p, q).sum(-1).log()


PLAIN = {
    reverse_kl: plain_reverse_kl,
    forward_kl: plain_forward_kl,
    total_variation: plain_total_variation,
    negative_log_acceptance: plain_negative_log_acceptance,
}


def distributions(adapter, features, hidden, columns=slice(None)):
    p = adapter.logits(features)[..., columns].softmax(-1).detach()
    return p, adapter.logits(hidden)[..., columns].softmax(-1)


@pytest.mark.parametrize("first", PLAIN, ids=lambda each: each.__name__)
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # plain, soft-capped
def test_each_equals_its_plain_formula(family, subset, chunk_size, first):
    """Value and gradient at any place in the pass: the gradient of the last one is stored in place of q."""
    adapter = TargetAdapter(make_target(family).requires_grad_(False))
    hidden, features = rows(14, seed=1).view(2, 7, -1).requires_grad_(), rows(7, seed=2)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 0] = valid[1, 4] = False
    token_ids = torch.tensor([0, 3, 4, 17, 90, 91, 127]) if subset else None
    order = [*(each for each in PLAIN if each is not first), first]
    options = {"valid": valid, "token_ids": token_ids, "chunk_size": chunk_size}
    result = chunked_pass(hidden, features, adapter.logits, dict.fromkeys(order, True), **options)
    for each in order:
        for step in range(2):
            kept = valid[step]
            alone = hidden[step, kept].detach().requires_grad_()
            columns = slice(None) if token_ids is None else token_ids
            expected = PLAIN[each](*distributions(adapter, features[kept], alone, columns)).mean()
            torch.testing.assert_close(result.means[each][step], expected, rtol=1e-12, atol=1e-12)
            (gradient,) = torch.autograd.grad(result.means[each][step], hidden, retain_graph=True)
            torch.testing.assert_close(
                gradient[step, kept], torch.autograd.grad(expected, alone)[0], rtol=1e-10, atol=1e-12
            )
            assert (gradient[step, ~kept] == 0).all() and (gradient[1 - step] == 0).all()


def lk_hybrid(hidden, features, valid, logits_fn):
    wanted = dict.fromkeys(LK_HYBRID.comparisons, True)
    batch = LossBatch(hidden, features, valid, torch.arange(len(features)))
    batch.compared = chunked_pass(hidden, features, logits_fn, wanted, valid=valid, chunk_size=3).means
    return LK_HYBRID.function(batch, SimpleNamespace())


def test_the_lk_hybrid_has_a_share_for_each_step():
    adapter = TargetAdapter(make_target("gemma3_text").requires_grad_(False))
    features = rows(7, seed=2)
    # the second step's outputs are near the target's: its overlap is larger, its share of the divergence smaller
    hidden = torch.stack([rows(7, seed=1), features + 0.1 * rows(7, seed=3)]).requires_grad_()
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    found = lk_hybrid(hidden, features, valid, adapter.logits)
    shares = []
    for step in range(2):
        kept = valid[step]
        alone = hidden[step, kept].detach().requires_grad_()
        p, q = distributions(adapter, features[kept], alone)
        share = math.exp(-3 * torch.minimum(p, q).sum(-1).mean().item())
        expected = share * plain_forward_kl(p, q).mean() + (1 - share) * plain_total_variation(p, q).mean()
        torch.testing.assert_close(found[step], expected, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(found[step], hidden, retain_graph=True)
        torch.testing.assert_close(
            gradient[step, kept], torch.autograd.grad(expected, alone)[0], rtol=1e-10, atol=1e-12
        )
        shares.append(share)
    assert shares[1] < shares[0]


def test_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    hidden = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    features = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    means = chunked_pass(hidden, features, lambda x: x * 1.0, dict.fromkeys(PLAIN, True)).means
    overlap = 0.5 + 0.25
    expected = {
        reverse_kl: (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), [-math.log(3) / 4, math.log(3) / 4]),
        forward_kl: (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5), [-0.25, 0.25]),
        total_variation: (1 - overlap, [-0.25, 0.25]),
        negative_log_acceptance: (-math.log(overlap), [-0.25 / overlap, 0.25 / overlap]),
    }
    for each, (value, gradient) in expected.items():
        assert means[each].item() == pytest.approx(value)
        (found,) = torch.autograd.grad(means[each].sum(), hidden, retain_graph=True)
        assert found.flatten().tolist() == pytest.approx(gradient), each.__name__


def test_no_value_is_infinite_where_probabilities_underflow():
    """One of p and one of q is exactly 0 in float32, and the overlap with them."""
    hidden = torch.tensor([[[300.0, 0.0]]], requires_grad=True)
    features = torch.tensor([[0.0, 300.0]])
    means = chunked_pass(hidden, features, lambda x: x * 1.0, dict.fromkeys(PLAIN, True)).means
    for each, mean in means.items():
        (gradient,) = torch.autograd.grad(mean.sum(), hidden, retain_graph=True)
        assert mean.isfinite().all() and gradient.isfinite().all(), each.__name__
    assert means[total_variation].item() == 1.0
    assert means[forward_kl].item() == pytest.approx(300.0)


@pytest.mark.parametrize("name", ["reverse_kl", "tv", "nla", "lk_hybrid"])
def test_each_trains_a_drafter_alone(name, tmp_path):
    only = {"regression_loss_weight": 0.0, "classification_loss_weight": 0.0, f"{name}_loss_weight": 1.0}
    trainer = make_trainer(tmp_path, make_target(), preset="hass", rollout_schedule="2", num_train_epochs=4, **only)
    trainer.train()
    values = logged(trainer, f"{name}_1")
    assert values[-1] < values[0] and logged(trainer, f"{name}_2")
    assert logged(trainer, "loss")[0] == pytest.approx(values[0] + logged(trainer, f"{name}_2")[0], rel=0.2)


def test_a_negative_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lk_hybrid_loss_weight=-1 must not be negative"):
        make_args(tmp_path, lk_hybrid_loss_weight=-1)
