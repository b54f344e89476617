"""Draft trees against trees written out by hand and against a slow dictionary-of-paths reference."""

import re

import pytest
import torch

from coral_hf.generation.draft_tree import DraftTree, DraftTreeBuilder, ancestors_of
from coral_hf.generation.settings import DraftSettings


FLAGS = ("draft_groups_per_row", "draft_stock_loop", "draft_cost_aware", "draft_lookup", "draft_compile")


def test_chain():
    tree = DraftTree.chain(torch.tensor([[7, 8, 9]]))
    assert tree.parents.tolist() == [[-1, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 2]]
    assert tree.ancestors.int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    assert tree.is_chain and tree.depth == 2
    assert DraftTree.chain(torch.zeros(1, 5, dtype=torch.long, device="meta")).depth == 4  # without asking the device


def test_tree_by_hand():
    """Root 7; level 1: a (-0.1), b (-1.0); level 2: a->c (-0.3), a->d (-2.1), b->e (-1.2), b->f (-4.0)."""
    builder = DraftTreeBuilder(torch.tensor([[7]]), top_k=2)
    tokens, stored, parent = builder.add_level(torch.tensor([[[10, 11]]]), torch.tensor([[[-0.1, -1.0]]]))
    assert (tokens.tolist(), stored.tolist(), parent.tolist()) == ([[10, 11]], [[1, 2]], [[0, 0]])
    tokens, stored, parent = builder.add_level(
        torch.tensor([[[12, 13], [14, 15]]]), torch.tensor([[[-0.2, -2.0], [-0.2, -3.0]]])
    )
    # the best two of level 2: c under a, e under b
    assert (tokens.tolist(), stored.tolist(), parent.tolist()) == ([[12, 14]], [[3, 5]], [[0, 1]])
    tree = builder.build(total_tokens=5)
    assert tree.tokens.tolist() == [[7, 10, 11, 12, 14]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    torch.testing.assert_close(tree.scores, torch.tensor([[0.0, -0.1, -1.0, -0.3, -1.2]]))
    assert tree.ancestors.int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    ]


def test_a_certain_child_never_displaces_its_parent():
    """q = 1 gives a child its parent's score: the parent must win the tie."""
    builder = DraftTreeBuilder(torch.tensor([[7]]), top_k=2)
    builder.add_level(torch.tensor([[[10, 11]]]), torch.tensor([[[-1.0, -1.0]]]))
    builder.add_level(torch.tensor([[[12, 13], [14, 15]]]), torch.tensor([[[0.0, -9.0], [0.0, -9.0]]]))
    tree = builder.build(total_tokens=2)
    assert tree.tokens.tolist() == [[7, 10]]


@pytest.mark.parametrize("calibrate", [None, lambda chances, _: chances.sqrt()])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_a_tree_whatever_the_drafter_says(seed, calibrate):
    """NaN and infinities of an overflow, and log q above 0: every kept node has its own parent."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-3, 0.0])
    builder, parents = DraftTreeBuilder(torch.tensor([[0]]), 3, calibrate), {}
    frontier, next_token = [0], 1
    for _ in range(4):
        log_q = -torch.rand(1, len(frontier), 3, generator=generator)
        draws = torch.randint(0, 10, log_q.shape, generator=generator)
        log_q = torch.where(draws < 5, odd[draws.clamp(max=4)], log_q)
        tokens = torch.arange(next_token, next_token + log_q.numel()).view_as(log_q)
        next_token += log_q.numel()
        parents |= {int(child): token for row, token in zip(tokens[0], frontier, strict=True) for child in row}
        chosen, _, _ = builder.add_level(tokens, log_q)
        frontier = chosen[0].tolist()
    for total in range(2, 14):
        tree = builder.build(total)
        assert not tree.scores.isnan().any() and (tree.scores <= 0).all()
        for node in range(1, total):
            parent = int(tree.parents[0, node])
            assert 0 <= parent < node and int(tree.tokens[0, parent]) == parents[int(tree.tokens[0, node])]


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_against_a_slow_reference(seed):
    """Levels are expanded by hand from a table of path -> log q; every kept set is closed under parents."""
    generator = torch.Generator().manual_seed(seed)
    top_k, depth = 1 + seed % 4, 1 + seed % 5
    total = min(2 + seed, DraftSettings(draft_depth=depth, draft_top_k=top_k).max_total_tokens)
    builder = DraftTreeBuilder(torch.tensor([[0]]), top_k)
    stored_paths, scores = [()], {(): 0.0}
    frontier = [()]
    next_token = 1
    for _ in range(depth):
        log_q = -torch.rand(1, len(frontier), top_k, generator=generator)
        tokens = torch.arange(next_token, next_token + log_q.numel()).view_as(log_q)
        next_token += log_q.numel()
        level = []
        for row, path in enumerate(frontier):
            for column in range(top_k):
                child = (*path, int(tokens[0, row, column]))
                scores[child] = scores[path] + float(log_q[0, row, column])
                level.append(child)
        stored_paths += level
        chosen, _, _ = builder.add_level(tokens, log_q)
        frontier = sorted(level, key=lambda path: -scores[path])[:top_k]
        assert chosen[0].tolist() == [path[-1] for path in frontier]
    tree = builder.build(total)
    best = set(sorted(stored_paths[1:], key=lambda path: -scores[path])[: total - 1])
    paths = {}
    for node in range(tree.num_nodes):
        parent = int(tree.parents[0, node])
        assert parent < node
        paths[node] = (*paths[parent], int(tree.tokens[0, node])) if node else ()
        assert int(tree.depths[0, node]) == len(paths[node])
        assert abs(float(tree.scores[0, node]) - scores[paths[node]]) < 1e-5
        mine = {
            other
            for other in range(tree.num_nodes)
            if paths[node][: len(paths.get(other, (None,) * 99))] == paths.get(other)
        }
        assert set(tree.ancestors[0, node].nonzero().flatten().tolist()) == mine
    assert set(paths.values()) - {()} == best


def test_ancestors_of_a_deep_chain():
    parents = torch.arange(-1, 16)[None]
    assert torch.equal(ancestors_of(parents, 16), torch.ones(17, 17).tril().bool()[None])


def test_settings():
    class Config:
        draft_depth, draft_top_k, draft_total_tokens = 6, 4, 20

    from transformers import GenerationConfig

    assert DraftSettings.resolve(Config).draft_total_tokens == 20
    chain = DraftSettings.resolve(Config, GenerationConfig(draft_top_k=1))
    assert chain.is_chain and chain.draft_total_tokens == 7
    # a smaller tree than the config's total: the total shrinks to what it can hold
    small = DraftSettings.resolve(Config, GenerationConfig(draft_depth=1))
    assert small.draft_total_tokens == 5
    assert DraftSettings.resolve(Config, None, {"draft_depth": 2}).draft_depth == 2
    # an explicit None lifts the config's total
    for sizes in ({}, {"draft_top_k": 2}):
        lifted = DraftSettings.resolve(Config, GenerationConfig(draft_total_tokens=None, **sizes))
        assert lifted.draft_total_tokens == lifted.max_total_tokens > 20
    Config.draft_cost_aware = True
    assert DraftSettings.resolve(Config).draft_cost_aware
    assert DraftSettings.resolve(Config, GenerationConfig(draft_head="full")).draft_cost_aware
    assert not DraftSettings.resolve(Config, GenerationConfig(draft_total_tokens=4)).draft_cost_aware  # exactly 4
    assert DraftSettings.resolve(Config, None, {"draft_depth": 2, "draft_cost_aware": True}).draft_cost_aware
    # over a config of chains: a chain as deep as the call says, a tree of no more nodes
    Config.draft_top_k, Config.draft_total_tokens = 1, 4
    assert DraftSettings.resolve(Config).max_levels == 3
    assert DraftSettings.resolve(Config, None, {"draft_depth": 10}).max_levels == 10
    assert DraftSettings.resolve(Config, None, {"draft_top_k": 4}).draft_total_tokens == 4
    with pytest.raises(ValueError, match="draft_width"):
        DraftSettings.resolve(Config, None, {"draft_width": 2})
    flags = [{name: value} for name in FLAGS for value in ("false", "no", 0, 1, 1.0, [])]
    kinds = [{"draft_head": ["full"]}, {"draft_head": True}, {"draft_scoring": 3}, {"draft_active_groups": "2"}]
    sizes = [{"draft_depth": 0}, {"draft_top_k": 2.5}, {"draft_total_tokens": 1}, {"draft_depth": True}]
    for bad in [*flags, *kinds, *sizes]:
        (name, value), *_ = bad.items()
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
            DraftSettings(**bad)
