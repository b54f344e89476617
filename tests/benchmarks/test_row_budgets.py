"""Budgets of nodes, shared between rows or not: two rows by hand."""

import runpy

import pytest
import torch
from helpers.scripts import BENCHMARKS


SCRIPT = runpy.run_path(str(BENCHMARKS / "compare_row_budgets.py"))


def test_kept_by_hand():
    chances = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.1, 0.1]])
    assert SCRIPT["kept"](chances, 2).tolist() == [[True, False, True], [True, True, False]]
    assert SCRIPT["kept"](chances.flatten()[None], 3).tolist() == [[True, True, True, False, False, False]]


def test_a_sure_row_takes_the_nodes_of_a_doubtful_one():
    """Half of all tokens accept any draft, the others none: a shared budget puts all nodes where they are accepted."""
    chances = torch.tensor([[1.0] * 8, [0.0] * 8])
    row = SCRIPT["compare"](chances, chances > 0, rows=2, nodes=5, batches=4000)
    assert row["tokens_equal"] == pytest.approx(1 + 0.5 * 4, rel=0.05)
    # of a mixed pair the sure row has all eight, and among equals the first has them
    assert row["tokens_pooled"] == pytest.approx(1 + 0.75 * 4, rel=0.05) and row["padded_nodes"] == 9
