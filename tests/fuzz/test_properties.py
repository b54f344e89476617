"""Property tests: random trees, acceptance walks, cache compaction and group partitions against slow references.

Derandomised: the same examples everywhere. `HYPOTHESIS_PROFILE=thorough` draws 20 times as many, at random.
"""

import os

import pytest
import torch
from helpers.tiny_models import make_target, randomize
from helpers.trees import prefilled, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

from coral_hf import TargetAdapter
from coral_hf.drafter.configuration_coral import group_size
from coral_hf.drafter.draft_head import DraftHead, FrequencyShortlist, LMHeadRouter
from coral_hf.generation.acceptance import accept_greedy, accept_walk
from coral_hf.generation.draft_tree import DraftTreeBuilder
from coral_hf.generation.key_values.dynamic import compact_cache, tree_attention_mask
from coral_hf.generation.settings import DraftSettings


settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=800, deadline=None, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

TOKENS = 6  # few ids, so that branches and choices meet


@st.composite
def trees(draw, most_nodes: int = 20):
    """Parents before children; children of one node hold different tokens."""
    parents, tokens = [-1], [draw(st.integers(0, TOKENS - 1))]
    for _ in range(draw(st.integers(0, most_nodes - 1))):
        parent = draw(st.integers(0, len(parents) - 1))
        taken = {tokens[node] for node in range(1, len(parents)) if parents[node] == parent}
        free = sorted(set(range(TOKENS)) - taken)
        if free:
            parents.append(parent)
            tokens.append(draw(st.sampled_from(free)))
    return tree_of(tokens, parents)


def path_to(tree, node: int) -> list[int]:
    """Nodes from the root to `node`, by walking up."""
    path = [node]
    while path[0]:
        path.insert(0, int(tree.parents[0, path[0]]))
    return path


@given(trees(), st.integers(0, 5), st.integers(0, 9), st.one_of(st.none(), st.integers(1, 6)))
def test_masks(tree, padding, length, window):
    """Ancestors, depths and the attention mask of every node by walking up to the root."""
    length += padding
    seen = torch.arange(length) >= padding
    offset = 0 if window is None else max(length - window + 1, 0)
    keys = length - offset + tree.num_nodes
    mask = tree_attention_mask(tree, length, keys, offset, window, seen[None] if padding else None)
    for node in range(tree.num_nodes):
        path = path_to(tree, node)
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == path
        assert int(tree.depths[0, node]) == len(path) - 1
        # the whole text that ends in this node, by position
        text = [*range(length), *(length + other for other in path)]
        near = text if window is None else text[-window:]
        expected = {slot - offset for slot in near if slot >= length or bool(seen[slot])}
        assert set(mask[0, 0, node].nonzero().flatten().tolist()) == expected


@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_built_trees(data, top_k, depth):
    """The best nodes by path score are kept; every parent is kept too, before its children."""
    builder = DraftTreeBuilder(torch.tensor([[0]]), top_k)
    table = {0: (0.0, None)}  # stored index -> score, parent
    frontier = [0]
    for _ in range(depth):
        # eighths add up without rounding, and make ties
        drawn = st.integers(-16, 0).map(lambda number: number / 8)
        log_q = data.draw(st.lists(drawn, min_size=len(frontier) * top_k, max_size=len(frontier) * top_k))
        first, count = len(table), 0
        for parent in frontier:
            for _ in range(top_k):
                table[first + count] = (table[parent][0] + log_q[count], parent)
                count += 1
        tokens = torch.arange(first, first + count).view(1, len(frontier), top_k)
        chosen, stored, _ = builder.add_level(tokens, torch.tensor(log_q).view(1, len(frontier), top_k))
        new = range(first, first + count)
        frontier = sorted(new, key=lambda node: (-table[node][0], node))[:top_k]
        assert chosen[0].tolist() == stored[0].tolist() == frontier
    total = data.draw(st.integers(2, DraftSettings(draft_depth=depth, draft_top_k=top_k).max_total_tokens))
    tree = builder.build(total)
    best = sorted([node for node in table if node], key=lambda node: (-table[node][0], node))[: total - 1]
    assert tree.tokens[0].tolist() == [0, *sorted(best)]
    kept = tree.tokens[0].tolist()
    for place, node in enumerate(kept[1:], start=1):
        assert kept[int(tree.parents[0, place])] == table[node][1] and int(tree.parents[0, place]) < place


def slow_walk(tree, choices: list[int], most: int) -> tuple[list[int], list[int]]:
    """Down from the root while a child equals the choice at its parent, at most `most` tokens."""
    path, chosen = [0], [choices[0]]
    while len(chosen) < most:
        found = [
            n
            for n in range(1, tree.num_nodes)
            if int(tree.parents[0, n]) == path[-1] and int(tree.tokens[0, n]) == chosen[-1]
        ]
        if not found:
            break
        path.append(found[0])
        chosen.append(choices[found[0]])
    return path, chosen


@given(trees(), st.data())
def test_acceptance(tree, data):
    choices = data.draw(st.lists(st.integers(0, TOKENS - 1), min_size=tree.num_nodes, max_size=tree.num_nodes))
    expected = slow_walk(tree, choices, most=99)
    path, tokens = accept_greedy(tree, torch.tensor([choices]))
    assert (path[0], tokens[0]) == expected
    most, asked = data.draw(st.integers(1, 8)), []

    def choose(rows, nodes):
        asked.extend(nodes)
        return [choices[nodes[0]]]

    path, tokens = accept_walk(tree, choose, lambda rows, tokens: [len(asked) == most])
    assert (path[0], tokens[0]) == slow_walk(tree, choices, most)
    assert asked == path[0]  # each node once, in order


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_hundreds_of_compactions(family):
    """200 rounds of random trees and paths: the cache equals that of the text, recomputed from scratch."""
    target = make_target(family)
    generator = torch.Generator().manual_seed(5)

    def below(limit):
        return int(torch.randint(limit, (), generator=generator))

    ids = torch.randint(3, 128, (1, 3), generator=generator)
    with torch.no_grad():
        verifier = prefilled(target, ids)
        for number in range(200):
            parents = [-1] + [below(node) for node in range(1, 2 + below(7))]
            # a node's own token, so that siblings differ
            tree = tree_of([int(ids[0, -1])] + [3 + node for node in range(1, len(parents))], parents)
            path = path_to(tree, below(tree.num_nodes) if below(3) else 0)
            if number > 150 and len(path) > 2:  # at most 512 positions
                path = path[:2]
            logits = verifier.verify(tree).logits[:, path[-1]]
            compact_cache(verifier.cache, path, tree.num_nodes)
            ids = torch.cat([ids, tree.tokens[:, path]], dim=1)
            assert verifier.cache.get_seq_length() == ids.shape[1]
            if number % 50 == 49:
                torch.testing.assert_close(logits, target(ids).logits[:, -1], rtol=1e-8, atol=1e-8)
        fresh = prefilled(target, ids).cache
        for ours, theirs in zip(verifier.cache.layers, fresh.layers, strict=True):
            rows = min(ours.keys.shape[-2], theirs.keys.shape[-2])
            assert rows >= 15
            torch.testing.assert_close(ours.keys[:, :, -rows:], theirs.keys[:, :, -rows:], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours.values[:, :, -rows:], theirs.values[:, :, -rows:], rtol=1e-6, atol=1e-6)


ADAPTER = TargetAdapter(make_target().requires_grad_(False))


@given(st.data(), st.integers(1, 130), st.integers(0, 30), st.booleans(), st.integers(1, 4), st.integers(0, 999))
def test_group_partitions(data, num_groups, listed, per_row, rows, seed):
    """For any partition of the head, drafts come from the full head, masked to the active ids, and its softmax."""
    router = randomize(LMHeadRouter(32, 128, num_groups, 8).double(), seed).requires_grad_(False)
    num_groups, size = router.num_groups, group_size(128, num_groups)
    assert (num_groups - 1) * size < 128 <= num_groups * size  # no group is empty, and none is missing
    active = data.draw(st.integers(1, num_groups))
    generator = torch.Generator().manual_seed(seed)
    shortlist = None
    if listed:
        shortlist = FrequencyShortlist(listed).count(torch.rand(128, generator=generator))
    head = DraftHead(ADAPTER, router, shortlist, active, per_row)
    k = data.draw(st.integers(1, min(8, head.fewest_tokens)))
    hidden = torch.randn(1, rows, 32, dtype=torch.float64, generator=generator)
    ids, log_q = head.top_k(hidden, k)
    mass = router(hidden).float()
    if not per_row and rows > 1:
        mass = mass.softmax(-1).sum(1, keepdim=True).expand(1, rows, num_groups)
    full = ADAPTER.logits(hidden).float()
    for row in range(rows):
        groups = mass[0, row].topk(active).indices
        allowed = torch.isin(torch.arange(128) // size, groups)
        if shortlist is not None:
            allowed[shortlist.token_ids] = True
        expected = full[0, row].masked_fill(~allowed, float("-inf")).log_softmax(-1)
        best = expected.topk(k)
        torch.testing.assert_close(log_q[0, row], best.values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(expected[ids[0, row]], best.values, rtol=1e-5, atol=1e-5)
        assert len(set(ids[0, row].tolist())) == k
