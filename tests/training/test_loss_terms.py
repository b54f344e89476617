"""The list of terms, and everything derived from it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_trainings import make_args
from helpers.tiny_trainings import random_features as rows

from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.losses import terms
from coral_hf.training.losses.classification import cross_entropy
from coral_hf.training.losses.loss_term import LossBatch, LossTerm
from coral_hf.training.losses.regression import regression_loss
from coral_hf.training.losses.top_k import top_k_cross_entropy
from coral_hf.training.report.learning_curve import draw_learning_curve
from coral_hf.training.run import checkpoints


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


# The list ------------------------------------------------------------------------------------------------------


def squared(batch, args):
    return torch.stack([(hidden - goals).square().mean() * args.squared_scale for hidden, goals in batch.steps()])


def test_sum_and_log_follow_from_the_list(monkeypatch):
    term = LossTerm("squared", "squared_weight", squared, settings=("squared_scale",))
    args = SimpleNamespace(step_decay=0.5, squared_weight=3.0, squared_scale=2.0)
    monkeypatch.setattr(terms, "TERMS", (term,))
    hidden = rows(8).view(2, 4, 32)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    batch = LossBatch(hidden, rows(4, seed=1), valid, torch.arange(4))
    loss, shown = terms.weighted_sum(batch, args, 1.0)
    by_hand = [2.0 * (hidden[step, step:] - rows(4, seed=1)[step:]).square().mean() for step in (0, 1)]
    assert loss.item() == pytest.approx((3.0 * (by_hand[0] + 0.5 * 3 / 4 * by_hand[1])).item())
    assert {name: mean.item() for name, (mean, _) in shown.items()} == pytest.approx(
        {"squared_1": by_hand[0].item(), "squared_2": by_hand[1].item()}
    )
    assert [count.item() for _, count in shown.values()] == [4, 3]


@pytest.mark.parametrize("term", terms.TERMS, ids=[term.name for term in terms.TERMS])
def test_every_term_is_checked_resumed_with_and_drawn(term, tmp_path):
    with pytest.raises(ValueError, match=f"{term.weight}=-1.0 must not be negative"):
        make_args(tmp_path, **{term.weight: -1.0})
    assert {term.weight, *term.settings} <= set(checkpoints._RECIPE)
    fields = {item.name for item in dataclasses.fields(CoralTrainingArguments)}
    assert {term.weight, *term.settings} <= fields
    pytest.importorskip("matplotlib")
    name = term.name if term.across_steps else f"{term.name}_1"
    assert draw_learning_curve([{"step": 1, name: 0.5}], tmp_path / "curve.png") is not None


def test_a_term_of_weight_zero_costs_nothing():
    args = CoralTrainingArguments(output_dir="unused", preset="hass", classification_loss_weight=0.0)
    assert terms.comparisons(args) == {cross_entropy: False}
    args.topk_loss_weight = 1.0
    assert terms.comparisons(args) == {cross_entropy: False, top_k_cross_entropy: True}
