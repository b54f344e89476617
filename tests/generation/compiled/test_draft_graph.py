"""A draft as a function of fixed shapes against the drafts of the eager loop: the same trees, row by row."""

import pytest
import torch
from helpers.batches import padded
from helpers.graphs import graphed
from helpers.parity import TREES, config_of, prompt_of
from helpers.tiny_models import make_drafter, randomize

from coral_hf.drafter.configuration_coral import CALIBRATION_KNOTS
from coral_hf.generation import hook
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.compiled.graphed_generator import GraphedGenerator
from coral_hf.generation.costs.pace import Pace
from coral_hf.generation.tree_size import DraftCosts


def paths_of(tree, row: int) -> dict[tuple, float]:
    """Every path of a tree, as its tokens, and its log-probability."""
    found = {}
    for node in range(tree.num_nodes):
        above = tree.ancestors[row, node].nonzero().flatten()
        above = above[tree.depths[row, above].argsort()]
        assert tree.depths[row, above].tolist() == list(range(len(above)))
        assert tree.parents[row, above[1:]].tolist() == above[:-1].tolist()
        found[tuple(tree.tokens[row, above].tolist())] = float(tree.scores[row, node])
    assert len(found) == tree.num_nodes
    return found


def drafts_of(kind, monkeypatch, generate) -> list[list[dict]]:
    """The proposals of a generator at each step, for each row."""
    trees, propose = [], kind.propose

    def recorded(self, *args):
        tree = propose(self, *args)
        trees.append([paths_of(tree, row) for row in range(len(tree.tokens))])
        return tree

    with monkeypatch.context() as patch:
        patch.setattr(kind, "propose", recorded)
        generate()
    return trees


def assert_same_drafts(target, drafter, tree, monkeypatch, lengths=(9,), **settings):
    ids, mask = padded(list(lengths))
    # an end far away: where a text ends a graph drafts as deep as ever
    settings = {"max_new_tokens": 20, "pad_token_id": 0, **settings}

    def run(config):
        return lambda: target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=drafter)

    eager = drafts_of(CoralCandidateGenerator, monkeypatch, run(config_of(tree, **settings)))
    graph = drafts_of(GraphedGenerator, monkeypatch, run(graphed(tree, **settings)))
    assert len(eager) == len(graph)
    deep = tree["draft_depth"]
    for ours, theirs in list(zip(graph, eager, strict=True))[: -deep - 1]:
        for row, expected in zip(ours, theirs, strict=True):
            assert row.keys() == expected.keys()
            for path, score in row.items():
                assert score == pytest.approx(expected[path], abs=1e-4)
    assert len(eager) > deep + 3


@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
@pytest.mark.parametrize("tree", list(TREES))
def test_trees_are_those_of_the_eager_loop(target, shape, tree, untraced, monkeypatch):
    drafter = randomize(make_drafter(target, shape=shape))
    assert_same_drafts(target, drafter, TREES[tree], monkeypatch)


@pytest.mark.parametrize("tree", ["chain", "tree16"])
def test_of_a_batch_of_other_lengths(target, tree, untraced, monkeypatch):
    assert_same_drafts(target, randomize(make_drafter(target)), TREES[tree], monkeypatch, [9, 1, 20, 17])


def test_of_several_features(target, untraced, monkeypatch):
    drafter = randomize(make_drafter(target, target_feature_layers=[1, 2, -1], fc_norm=True))
    assert_same_drafts(target, drafter, TREES["tree16"], monkeypatch)


@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize("head", ["router", "shortlist", "both", "rows", "own", "low_rank"])
def test_of_cheap_heads(target, tree, head, untraced, monkeypatch):
    settings = {"own": {"draft_vocab_size": 60}, "low_rank": {"low_rank_size": 6}}
    drafter = make_drafter(target, **settings.get(head, {}))
    if head in ("router", "both", "rows"):
        drafter.add_router(8, 3).double()
    if head in ("shortlist", "both"):
        drafter.add_shortlist(torch.arange(128, 0, -1), 40)
    sizes = {**TREES[tree], "draft_head": {"own": None, "rows": "router"}.get(head, head)}
    if head == "rows":
        sizes |= {"draft_groups_per_row": True, "draft_scoring": "router"}
    assert_same_drafts(target, randomize(drafter), sizes, monkeypatch)


@pytest.mark.parametrize("slope, sizes", [(0.0, {16}), (0.4, {1, 8, 16}), (20.0, {1})])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_cost_aware_rule_chooses_among_all_levels(target, calibrated, slope, sizes, untraced, monkeypatch):
    """As many nodes as pay best of the whole draft, in the sizes that trees are padded to; the best of them, which are a tree."""
    rows = [[value**1.5 for value in CALIBRATION_KNOTS], list(CALIBRATION_KNOTS)]
    drafter = randomize(make_drafter(target, **({"draft_calibration": rows} if calibrated else {})))
    target_ms = tuple(10.0 + slope * size for size in range(1, 17))
    monkeypatch.setattr(hook, "draft_costs", lambda *_: DraftCosts(target_ms, first_level_ms=2.0, level_ms=0.0))

    def drafts(**settings):
        config = graphed({**TREES["tree16"], **settings})
        return drafts_of(
            GraphedGenerator,
            monkeypatch,
            lambda: target.generate(prompt_of(9), generation_config=config, assistant_model=drafter),
        )

    whole, aware = drafts(), drafts(draft_cost_aware=True)
    assert {len(step[0]) for step in aware} <= sizes
    if not calibrated:
        assert len(whole[0][0]) == 16 and aware[0][0].items() <= whole[0][0].items()


@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize(
    "lengths, settings",
    [((9,), {}), ((9, 1, 20), {}), ((9, 1, 20), {"eos_token_id": list(range(3, 12))})],
    ids=["one", "batch", "rows that end"],
)
def test_what_plain_steps_left_is_read_in_several_passes(target, tree, lengths, settings, untraced, monkeypatch):
    steps = [0]

    def drafts(*_):
        steps[0] += 1
        return steps[0] % 15 in (2, 3, 14)

    monkeypatch.setattr(Pace, "drafts", drafts)
    drafter, (ids, mask) = randomize(make_drafter(target)), padded(list(lengths))

    def run(config):
        steps[0] = 0
        return target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=drafter)

    settings = {"max_new_tokens": 40, **settings}
    eager = drafts_of(CoralCandidateGenerator, monkeypatch, lambda: run(config_of(TREES[tree], **settings)))
    graph = drafts_of(GraphedGenerator, monkeypatch, lambda: run(graphed(TREES[tree], **settings)))
    assert len(eager) == len(graph) >= 4
    for ours, theirs in zip(graph[:-1], eager[:-1], strict=True):
        assert [row.keys() for row in ours] == [row.keys() for row in theirs]
