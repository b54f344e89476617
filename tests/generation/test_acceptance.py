"""Acceptance walks written out by hand, and the exact distribution of the sampled rule."""

import pytest
import torch
from helpers.trees import TREE, tree_of

from coral_hf.generation.acceptance import accept_greedy, accept_walk
from coral_hf.generation.draft_tree import DraftTree


def by(choices, last=None):
    """The choices after every node, and the token that ends a row."""
    rows = choices if isinstance(choices[0], list) else [choices]

    def choose(live, nodes):
        return [rows[row][node] for row, node in zip(live, nodes, strict=True)]

    return choose, lambda live, tokens: [token == last for token in tokens]


@pytest.mark.parametrize(
    ("choices", "path", "tokens"),
    [
        ([99, 0, 0, 0, 0, 0], [0], [99]),  # nothing matches: the bonus alone
        ([10, 99, 0, 0, 0, 0], [0, 1], [10, 99]),
        ([11, 0, 13, 0, 14, 50], [0, 2, 4, 5], [11, 13, 14, 50]),  # the second branch to its leaf
        ([10, 99, 13, 0, 14, 0], [0, 1], [10, 99]),  # a matching node under a rejected one does not count
    ],
)
def test_greedy(choices, path, tokens):
    got_path, got_tokens = accept_greedy(TREE, torch.tensor([choices]))
    assert (got_path, got_tokens) == ([path], [tokens])
    assert accept_walk(TREE, *by(choices)) == ([path], [tokens])


def test_walk_stops_inside_the_accepted_run():
    choices = [11, 0, 13, 0, 14, 50]
    assert accept_walk(TREE, *by(choices, last=13)) == ([[0, 2]], [[11, 13]])


def test_rows_walk_down_trees_of_their_own():
    """Rows alone, and in step: then all yield as many tokens as the shortest; a row that has ended delays none."""
    other = tree_of([7, 10, 11, 12, 13, 14], [-1, 0, 1, 2, 3, 4])  # a chain
    both = DraftTree(*(torch.cat(pair) for pair in zip(vars_of(TREE), vars_of(other), strict=True)))
    rows = [[11, 0, 13, 0, 14, 50], [10, 11, 12, 99, 0, 0]]
    paths, tokens = [[0, 2, 4, 5], [0, 1, 2, 3]], [[11, 13, 14, 50], [10, 11, 12, 99]]
    assert accept_greedy(both, torch.tensor(rows)) == accept_walk(both, *by(rows)) == (paths, tokens)
    rows[0][2] = 99
    assert accept_walk(both, *by(rows)) == ([paths[0][:2], paths[1]], [[11, 99], tokens[1]])
    assert accept_walk(both, *by(rows), in_step=True) == ([paths[0][:2], paths[1][:2]], [[11, 99], [10, 11]])
    assert accept_walk(both, *by(rows, last=99), in_step=True) == ([paths[0][:2], paths[1]], [[11, 99], tokens[1]])


def vars_of(tree):
    return tree.tokens, tree.parents, tree.depths, tree.scores, tree.ancestors


def _pairs(rule, draws: int = 8_000, seed: int = 0) -> torch.Tensor:
    """Counts of the first two tokens that a rule yields when p depends on the token before, vocabulary of 4."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    tree = tree_of([0, 3, 1, 0], [-1, 0, 0, 1])  # root 0; drafts 3 and 1; 3 -> 0
    counts = torch.zeros(4, 4)
    for _ in range(draws):
        tokens = rule(tree, p, generator)
        # one more plain step where the rule yielded a single token
        if len(tokens) == 1:
            tokens.append(int(torch.multinomial(p[tokens[0]], 1, generator=generator)))
        counts[tokens[0], tokens[1]] += 1
    expected = p[0][:, None] * p * draws
    return ((counts - expected) ** 2 / expected).sum()


def _ours(tree, p, generator):
    def choose(rows, nodes):
        return torch.multinomial(p[tree.tokens[0, nodes]], 1, generator=generator).flatten().tolist()

    return accept_walk(tree, choose, lambda rows, tokens: [False])[1][0]


def _broken(tree, p, generator):
    """Accepts the best-looking draft with its target probability, else draws again without removing it."""
    if torch.rand((), generator=generator) < p[0, 3]:
        return [3]
    return [int(torch.multinomial(p[0], 1, generator=generator))]


def test_sampled_rule_is_exact():
    """Chi-square with 15 degrees of freedom: 37.7 is p = 0.001."""
    assert _pairs(_ours) < 37.7
    assert _pairs(_broken) > 37.7
