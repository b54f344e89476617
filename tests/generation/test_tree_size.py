"""The rule that sizes a tree against a slow reference; calibration and smoothing against tables written out by hand."""

import itertools

import pytest
import torch

from coral_hf import CoralDraftConfig
from coral_hf.drafter.configuration_coral import CALIBRATION_KNOTS
from coral_hf.generation.draft_tree import DraftTreeBuilder
from coral_hf.generation.tree_size import Calibration, DraftCosts, TreeSizeRule, chain_depth, isotonic, smooth_times


STAIRS = DraftCosts((10.0, 16.0, 16.0, 16.0, 30.0, 30.0, 30.0, 30.0), first_level_ms=2.0, level_ms=3.0)


def slow_best(chances: list[float], levels: int, costs: DraftCosts, total: int) -> tuple[int, float]:
    """Every size tried; the smallest among equals."""
    ordered = sorted(chances, reverse=True)
    speeds = {}
    for size in range(1, min(total, len(chances) + 1) + 1):
        time = costs.first_level_ms + (levels - 1) * costs.level_ms + costs.target_ms[size - 1]
        speeds[size] = (1 + sum(ordered[: size - 1])) / time
    best = max(speeds, key=lambda size: (round(speeds[size], 9), -size))
    return best, speeds[best]


@pytest.mark.parametrize("seed", range(10))
def test_best_size_against_trying_every_size(seed):
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(12, generator=generator).cumsum(0).mul(8).floor().add(5).tolist()  # stairs of any shape
    costs = DraftCosts(tuple(times), 1.5, 0.5)
    chances = torch.rand(3, 5 + seed, generator=generator) ** 3
    for levels, total in itertools.product((1, 4), (2, 7, 12)):
        sizes, speeds = TreeSizeRule(costs, total).best_size(chances, levels)
        for row in range(3):
            size, speed = slow_best(chances[row].tolist(), levels, costs, total)
            assert (int(sizes[row]), float(speeds[row])) == (size, pytest.approx(speed, rel=1e-5))


def test_best_size_climbs_a_stair_when_the_whole_of_it_pays():
    """T is flat from 2 to 4: three likely nodes fill the stair, one alone is not worth its step up."""
    rule = TreeSizeRule(STAIRS, 8)
    sizes, _ = rule.best_size(torch.tensor([[0.9, 0.5, 0.3, 0.1], [0.2, 0.01, 0.01, 0.01], [0.9, 0.9, 0.9, 0.9]]), 1)
    assert sizes.tolist() == [4, 1, 4]


def test_a_level_is_drafted_while_it_repays():
    rule = TreeSizeRule(STAIRS, 8)

    def repays(best: float, level_ms: float = 3.0) -> bool:
        rule = TreeSizeRule(DraftCosts(STAIRS.target_ms, 2.0, level_ms), 8)
        chances = torch.tensor([[best, 0.05]])
        return bool(rule.repays_level(chances, chances, torch.ones(1, 2), levels=1))

    assert repays(0.95) and not repays(0.3) and not repays(0.95, level_ms=30.0)
    # the size never matters to a drafter that is free
    assert repays(0.95, level_ms=0.0)
    assert rule.repays_level(torch.rand(4, 6), torch.rand(4, 2), torch.ones(4, 2), levels=2).shape == (4,)


def test_isotonic_by_hand_and_against_the_minimax_formula():
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 1.0], [3.0, 1.0]) == [2.5, 2.5]
    values = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    mean = {(i, j): sum(values[i : j + 1]) / (j + 1 - i) for i in range(9) for j in range(i, 9)}
    slow = [max(min(mean[i, j] for j in range(k, 9)) for i in range(k + 1)) for k in range(9)]
    assert isotonic(values) == pytest.approx(slow)


def test_smooth_times():
    assert smooth_times({1: 4.0, 2: 3.0, 4: 8.0}, 4) == (3.5, 3.5, 5.75, 8.0)
    assert smooth_times({1: 4.0}, 1) == (4.0,)
    for measured in ({}, {1: 1.0, 3: 2.0}, {2: 1.0, 4: 1.0}):
        with pytest.raises(ValueError, match="from 1 to 4 nodes"):
            smooth_times(measured, 4)


def test_calibration():
    probabilities = torch.tensor([[0.0, 0.013, 0.4, 0.85, 1.0]])
    torch.testing.assert_close(Calibration([CALIBRATION_KNOTS])(probabilities, 3), probabilities)
    half = Calibration([CALIBRATION_KNOTS, [value / 2 for value in CALIBRATION_KNOTS]])
    torch.testing.assert_close(half(probabilities, 1), probabilities)
    for depth in (2, 7):  # the last row holds for all below
        torch.testing.assert_close(half(probabilities, depth), probabilities / 2)


def test_tables_are_copied_to_a_device_once():
    """Not at every level of every tree: the copy would make a GPU wait."""
    rule, calibration = TreeSizeRule(STAIRS, 8), Calibration([CALIBRATION_KNOTS])
    for device in ("cpu", "meta", "cpu", "meta"):
        chances = torch.rand(1, 4, device=device)
        assert calibration(chances, 1).device == rule.best_size(chances, 1)[0].device == chances.device
        assert rule._target_ms_on(chances.device) is rule._target_ms_on(chances.device)
        assert calibration._tables_on(chances.device) is calibration._tables_on(chances.device)
    assert len(rule._target_ms) == len(calibration._tables) == 2


def test_calibration_finds_the_acceptance_behind_the_data():
    """An overconfident drafter: accepted with p squared. Without data the drafted probability is used."""
    generator = torch.Generator().manual_seed(0)
    drafted = torch.rand(20_000, generator=generator)
    accepted = torch.rand(20_000, generator=generator) < drafted**2
    fitted = Calibration.fit([drafted, torch.empty(0)], [accepted, torch.empty(0, dtype=torch.bool)])
    points = torch.tensor([0.1, 0.4, 0.7, 1.0])
    torch.testing.assert_close(fitted(points, 1), points**2, atol=0.03, rtol=0)
    torch.testing.assert_close(fitted(points, 2), points, atol=1e-3, rtol=0)
    for row in fitted.rows:
        assert row == sorted(row) and row[0] >= 0 and row[-1] <= 1
    CoralDraftConfig(draft_calibration=fitted.rows)  # the fitted rows are a valid setting


def test_a_calibrated_tree_is_a_tree():
    """Deeper levels are trusted more than shallow ones: no node is kept without its parent all the same."""
    wild = Calibration([[0.0] * 7 + [0.1], [0.0] + [0.9] * 7])
    generator = torch.Generator().manual_seed(1)
    builder = DraftTreeBuilder(torch.tensor([[7]]), 3, wild)
    for width in (1, 3, 3):
        log_q = torch.randn(1, width, 3, generator=generator).log_softmax(-1)
        builder.add_level(torch.randint(9, (1, width, 3), generator=generator), log_q)
    assert builder.num_levels == 3 and builder.chances().max() <= 0.1
    for total in range(2, 22):
        tree = builder.build(total)
        assert (tree.parents[0, 1:] >= 0).all() and tree.num_nodes == total
        assert (tree.depths[0, 1:] == tree.depths[0, tree.parents[0, 1:]] + 1).all()


def test_bad_input():
    with pytest.raises(ValueError, match="up to 8 nodes, but draft_total_tokens=9"):
        TreeSizeRule(STAIRS, 9)
    for times in ((), (1.0, float("nan")), (-1.0,)):
        with pytest.raises(ValueError, match="not a table of times"):
            DraftCosts(times, 1.0, 1.0)
    for row in ([0.0] * 7, [0.5] * 7 + [0.4], [0.0] * 7 + [1.5]):
        with pytest.raises(ValueError, match="draft_calibration"):
            CoralDraftConfig(draft_calibration=[row])


def drafter_of(rows, layers=32, **settings):
    """A drafter's config with a calibration, for a target of so many layers of the drafter's own size."""
    sizes = {"hidden_size": 64, "vocab_size": 512, "target_num_hidden_layers": layers, "draft_depth": 8}
    return CoralDraftConfig(**sizes, draft_calibration=rows, **settings)


def test_a_chain_is_as_deep_as_its_tokens_pay():
    knots = len(CALIBRATION_KNOTS)
    assert chain_depth(drafter_of([[1.0] * knots])) == 8, "a chain that is always accepted pays at full depth"
    assert chain_depth(drafter_of([[0.0] * knots])) == 1
    assert chain_depth(drafter_of([[1.0] * knots] * 3 + [[0.0] * knots])) == 3
    # the dearer a draft step is beside the target, the shorter the chain
    depths = [chain_depth(drafter_of(None, layers)) for layers in (2, 8, 32, 128)]
    assert depths == sorted(depths) and depths[0] < depths[-1]
