"""The comparison of draft heads: what each costs, and what each covers, against slow counts."""

import runpy

import pytest
import torch
from helpers.scripts import BENCHMARKS
from helpers.tiny_models import make_drafter, make_target, randomize
from helpers.tiny_trainings import random_rows

from coral_hf import TargetAdapter
from coral_hf.data.dataset import ConversationDataset


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return {name: runpy.run_path(str(BENCHMARKS / f"{name}.py")) for name in ("compare_heads", "head_costs")}


def test_costs_are_those_of_the_weights_that_are_read(scripts):
    costs = scripts["head_costs"]
    drafter = make_drafter(make_target(), router_groups=16, low_rank_size=6, low_rank_candidates=9)
    weights = sum(p.numel() for p in drafter.low_rank.parameters())
    assert costs["low_rank_rows"](6, 9, 128, 32) == weights / 32 + 9
    assert costs["rank_within"](weights / 32 + 9, 9, 128, 32) == 6
    assert costs["rank_within"](1, 9, 128, 32) == 1 and costs["rank_within"](1e6, 9, 128, 32) == 32
    mlp = costs["router_rows"](drafter.router, 32)
    matrices = [drafter.router.up_proj.weight, drafter.router.down_proj.weight]
    assert mlp == sum(matrix.numel() for matrix in matrices) / 32
    assert costs["groups_within"](mlp + 3 * drafter.router.group_size, drafter.router, 32) == 3
    assert costs["groups_within"](1, drafter.router, 32) == 1 and costs["groups_within"](1e6, drafter.router, 32) == 16


def test_what_was_known_when_a_row_was_drafted(scripts):
    """Step k of a row drafts its token after k - 1 drafted ones, which the text does not contain yet."""
    target = make_target(dtype=torch.float32)
    rows = ConversationDataset([{"id": "a", "prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10, 11]}])
    outputs = scripts["compare_heads"]["collect"](make_drafter(target), TargetAdapter(target), rows, 2)
    assert outputs.texts == [[5, 6, 7, 8, 9, 10, 11]] and len(outputs.hidden) == len(outputs.places)
    assert outputs.places == [(0, token + 1 - step) for step in (1, 2) for token in range(3, 7)]
    lists = scripts["compare_heads"]["text_lists"]
    by_frequency = torch.tensor([8, 0, 5, *(token for token in range(128) if token not in (8, 0, 5))])
    found = [active.nonzero().flatten().tolist() for active in lists(outputs, 0, 2, by_frequency, 5)]
    assert found == [[0, 5, 6, 7, 8], [0, 5, 6, 7, 8]]
    (narrow,) = lists(outputs, 1, 1, by_frequency, 2)
    assert narrow.nonzero().flatten().tolist() == [7, 8]  # the latest of the text


@pytest.mark.parametrize("has_low_rank", [True, False])
def test_five_heads_at_equal_cost(scripts, has_low_rank):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, router_groups=32)
    randomize(drafter.router)
    if has_low_rank:
        drafter.add_low_rank_head(target, 8, 16)
    adapter = TargetAdapter(target)
    with torch.no_grad():
        outputs = scripts["compare_heads"]["collect"](drafter, adapter, ConversationDataset(random_rows(4)), 3)
        order = torch.randperm(128)
        rows = scripts["compare_heads"]["equal_cost"](outputs, drafter, adapter, order, None)
        p = adapter.logits(outputs.features).softmax(-1)
    found = {row["head"]: row for row in rows}
    assert list(found) == ["full", "shortlist", "router", "low_rank", "context"]
    assert found["low_rank"]["trained"] == has_low_rank
    assert found["full"]["uncovered"] == pytest.approx(0, abs=1e-5)
    assert found["full"]["recall"] == found["full"]["kept"] == 1
    cost = found["low_rank"]["cost_rows"]
    if has_low_rank:
        assert cost == 8 * (128 + 32) / 32 + 16
    assert abs(found["shortlist"]["cost_rows"] - cost) <= 0.5 and found["context"]["cost_rows"] == round(cost)
    assert abs(found["router"]["cost_rows"] - cost) <= drafter.router.group_size
    inside = p[:, order[: round(cost)]].sum(-1).mean().item()
    assert found["shortlist"]["uncovered"] == pytest.approx(1 - inside, abs=1e-5)
    with torch.no_grad():
        estimate = drafter.low_rank.logits(outputs.hidden, adapter)
    best = estimate.topk(drafter.config.low_rank_candidates).indices
    assert found["low_rank"]["uncovered"] == pytest.approx(1 - p.gather(1, best).sum(-1).mean().item(), abs=1e-5)
