"""The `evaluate` modules: loaded by path without a network, against figures worked out by hand."""

import random
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_drafter

import coral_hf
from coral_hf.generation.statistics import DraftStats


evaluate = pytest.importorskip("evaluate", reason="the metrics need evaluate (pip install 'coral-hf[eval]')")
METRICS = Path(coral_hf.__file__).parent / "evaluation" / "metrics"
pytestmark = pytest.mark.usefixtures("modules_cache")


def load(name, tmp_path):
    return evaluate.load(str(METRICS / name), cache_dir=str(tmp_path / "metrics"))


def test_acceptance_length_is_pooled(tmp_path):
    metric = load("acceptance_length", tmp_path)
    # 2 steps that accepted 3 and 1 of 3; 4 steps that accepted 0, 0, 0 and 2 of 2
    one, two = DraftStats(), DraftStats()
    for accepted in (3, 1):
        one.add_step(3, accepted)
    for accepted in (0, 0, 0, 2):
        two.add_step(2, accepted)
    for stats in (one, two):
        metric.add(**vars(stats))
    result = metric.compute()
    assert result["acceptance_length"] == pytest.approx(1 + 6 / 6)  # the mean of 3 and 1.5 would be 2.25
    assert result["acceptance_per_depth"] == pytest.approx(
        [3 / 6, 2 / 3, 1 / 1]
    )  # depth 3: drafted twice, reached once
    assert result["steps"] == 6
    empty = load("acceptance_length", tmp_path)
    empty.add(**vars(DraftStats()))
    assert empty.compute() == {"acceptance_length": 1.0, "acceptance_per_depth": [], "steps": 0}


def test_acceptance_per_depth_of_mixed_depths(tmp_path):
    """At a depth, only steps count that drafted to it and accepted all tokens before it."""
    generator = random.Random(0)
    calls = []
    for _ in range(4):
        depths = [generator.randint(0, 6) for _ in range(50)]
        calls.append([(depth, generator.randint(0, depth)) for depth in depths])
    calls.append([(1, 1)] * 6 + [(2, 2)] * 4 + [(2, 0)] * 10)
    steps = [step for call in calls for step in call]
    expected = []
    for k in range(1, 7):
        reached = [accepted for depth, accepted in steps if depth >= k and accepted >= k - 1]
        expected.append(sum(accepted >= k for accepted in reached) / len(reached))
    metric, pooled = load("acceptance_length", tmp_path), DraftStats()
    for call in calls:
        stats = DraftStats()
        for depth, accepted in call:
            stats.add_step(depth, accepted)
        pooled = pooled.merge(stats)
        metric.add(**vars(stats))
    assert stats.acceptance_per_depth == [0.5, 1.0]
    assert pooled.acceptance_per_depth == pytest.approx(expected)
    assert metric.compute()["acceptance_per_depth"] == pytest.approx(expected)


def test_acceptance_length_of_a_real_answer(tmp_path, target, prompt):
    drafter = make_drafter(target, draft_depth=3, draft_top_k=2)
    target.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=drafter, max_new_tokens=16)
    stats = drafter.last_stats
    metric = load("acceptance_length", tmp_path)
    metric.add(**vars(stats))
    result = metric.compute()
    assert result["acceptance_length"] == stats.acceptance_length
    assert result["acceptance_per_depth"] == stats.acceptance_per_depth


def test_acceptance_length_refuses_what_cannot_be(tmp_path):
    metric = load("acceptance_length", tmp_path)
    counts = {"drafted_per_depth": [2], "accepted_per_depth": [1], "reached_per_depth": [2]}
    for wrong in ({"n_accepted": 5}, {"n_accepted": 1, "reached_per_depth": []}):
        metric.add(**{"steps": 2, **counts, **wrong})
        with pytest.raises(ValueError, match=r"drafter\.last_stats"):
            metric.compute()


def test_speculative_speedup_is_the_median_of_pairs(tmp_path):
    metric = load("speculative_speedup", tmp_path)
    result = metric.compute(
        plain_tokens=[10, 10, 10], plain_seconds=[1.0, 2.0, 1.0], tokens=[10, 20, 10], seconds=[0.5, 1.0, 0.8]
    )
    assert result["speedup"] == pytest.approx(2.0)  # of 2, 4 and 1.25
    assert result["speedup_quartiles"] == pytest.approx([1.625, 3.0])
    assert result["tokens_per_second"] == pytest.approx(40 / 2.3)
    assert result["plain_tokens_per_second"] == pytest.approx(30 / 4.0)
    one = metric.compute(plain_tokens=[100], plain_seconds=[5.0], tokens=[100], seconds=[2.5])
    assert one["speedup"] == 2.0 and one["speedup_quartiles"] == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"= \(100, 5.0, 0, 2.5\): .* has no speed"):
        metric.compute(plain_tokens=[100], plain_seconds=[5.0], tokens=[0], seconds=[2.5])
