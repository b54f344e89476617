"""A drafted tree merged with a path: against a dictionary of paths, and by hand."""

import math

import pytest
import torch

from coral_hf.generation.draft_tree import DraftTreeBuilder
from coral_hf.generation.lookup.grafting import GraftedTreeBuilder


def log(*values):
    return torch.tensor(values).log()


def drafted(builder, levels):
    for tokens, log_probs in levels:
        builder.add_level(tokens, log_probs)
    return builder


def paths_of(tree, row: int) -> dict[tuple[int, ...], float]:
    """The tokens from the root to each node -> its score."""
    found = []
    for node, parent in enumerate(tree.parents[row].tolist()):
        found.append((*(found[parent] if parent >= 0 else ()), int(tree.tokens[row, node])))
    return dict(zip(found, tree.scores[row].tolist(), strict=True))


def random_levels(batch: int, top_k: int, depth: int, vocabulary: int, generator):
    levels, width = [], 1
    for _ in range(depth):
        tokens = torch.stack(
            [
                torch.stack([torch.randperm(vocabulary, generator=generator)[:top_k] for _ in range(width)])
                for _ in range(batch)
            ]
        )
        levels.append((tokens, torch.rand(batch, width, top_k, generator=generator).log()))
        width = top_k
    return levels


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("calibrate", [None, lambda p, depth: p.sqrt() * 0.9])
def test_the_best_of_both_are_kept(seed, calibrate):
    """Few tokens, so that path and draft often agree; each kept node once, with all its ancestors."""
    generator = torch.Generator().manual_seed(seed)
    batch, top_k, depth, length = 2, 3, 3, 5
    levels = random_levels(batch, top_k, depth, 4, generator)
    path = torch.randint(4, (batch, length), generator=generator)
    chances = torch.rand(batch, length, generator=generator).cumprod(dim=1)
    chances[1, 3:] = 0.0  # the second row's path is shorter
    root = torch.full((batch, 1), 9)
    plain = drafted(DraftTreeBuilder(root, top_k, calibrate), levels)
    whole = plain.build(10**6)
    builder = drafted(GraftedTreeBuilder(root, top_k, calibrate, path, chances), levels)
    weighed = builder.chances()
    assert torch.equal(builder.open_chances, plain.open_chances)
    size = 9
    tree = builder.build(size)
    for row in range(batch):
        stored = torch.cat([torch.ones(1), plain.chances()[row]]).tolist()
        expected = dict(zip(paths_of(whole, row), stored, strict=True))
        for step in range(length):
            if chances[row, step] > 0:
                key = (9, *path[row, : step + 1].tolist())
                expected[key] = max(expected.get(key, 0.0), float(chances[row, step]))
        best = sorted(expected.values(), reverse=True)[:size]
        # the candidates that the rule compares, and those it keeps
        assert sorted(weighed[row].tolist(), reverse=True)[: size - 1] == pytest.approx(best[1:])
        kept = paths_of(tree, row)
        assert len(kept) == size and kept.keys() <= expected.keys()
        assert sorted((expected[key] for key in kept), reverse=True) == pytest.approx(best)
        assert all(key[:-1] in kept for key in kept if len(key) > 1)
        for node, key in enumerate(kept):
            assert int(tree.depths[row, node]) == len(key) - 1
            above = [other for other, name in enumerate(kept) if name == key[: len(name)]]
            assert tree.ancestors[row, node].nonzero().flatten().tolist() == above


def test_by_hand():
    """The drafter says 1 or 2, after 1 then 3 or 4; the text continues 1, 4, 7, 8."""
    levels = [
        (torch.tensor([[[1, 2]]]), log(0.6, 0.3).view(1, 1, 2)),
        (torch.tensor([[[3, 4], [5, 6]]]), log(0.5, 0.25, 0.5, 0.25).view(1, 2, 2)),
    ]
    path, chances = torch.tensor([[1, 4, 7, 8]]), torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    builder = drafted(GraftedTreeBuilder(torch.tensor([[0]]), 2, None, path, chances), levels)
    # 1 and 4 are drafted with 0.6 and 0.15 and raised to the path's chances; 7 and 8 are the path's alone
    expected = [0.9, 0.3, 0.3, 0.8, 0.15, 0.075, 0.0, 0.0, 0.7, 0.1]
    assert builder.chances()[0].tolist() == pytest.approx(expected)
    tree = builder.build(6)
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 4, 7]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1, 4]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2, 3]]
    assert tree.scores[0].tolist() == pytest.approx([0.0, *log(0.6, 0.3, 0.3, 0.15, 0.7).tolist()])


def test_a_path_longer_than_the_draft_and_apart_from_it():
    levels = [(torch.tensor([[[1, 2]]]), log(0.5, 0.4).view(1, 1, 2))]
    path = torch.tensor([[3, 4, 5]])
    builder = drafted(GraftedTreeBuilder(torch.tensor([[0]]), 2, None, path, torch.tensor([[0.9, 0.8, 0.7]])), levels)
    tree = builder.build(4)
    assert tree.tokens.tolist() == [[0, 3, 4, 5]] and tree.depths.tolist() == [[0, 1, 2, 3]]
    assert tree.ancestors[0].tolist() == [[j <= i for j in range(4)] for i in range(4)]
    assert math.exp(tree.scores[0, 3]) == pytest.approx(0.7)
