"""Plain steps when drafting loses time: when they begin, how long they last, and how much a call can lose."""

import math

import pytest
import torch
from helpers.batches import compare_batch
from helpers.oracle import oracle
from helpers.parity import TREES, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target
from transformers import set_seed

from coral_hf.generation import hook
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.costs.pace import FIRST_CREDIT, LATER_CREDIT, LONGEST_PAUSE, MOST_CREDIT, PRIOR, Pace
from coral_hf.generation.draft_tree import DraftPromise
from coral_hf.generation.key_values import kept_rows
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tree_size import DraftCosts
from coral_hf.utils.compat import cache_kwarg, cache_of


FAIR = DraftCosts(tuple(10.0 + 0.5 * n for n in range(1, 65)), 1.0, 0.5)
DEAR = DraftCosts(tuple(10.0 * n for n in range(1, 65)), 10.0, 10.0)


def lost(pace: Pace, promise: DraftPromise, accepted: float, steps: int) -> tuple[float, int]:
    """The lost time over a number of tokens, in plain steps, and the steps that drafted."""
    time, drafted, tokens = 0.0, 0, 0.0
    while tokens < steps:
        if pace.drafts(FAIR):
            drafted += 1
            time += promise.step_ms / promise.plain_ms - 1 - accepted
            tokens += accepted
            pace.add(promise, accepted)
        tokens += 1
    return time, drafted


@pytest.mark.parametrize("step_ms", [11.0, 14.0, 30.0, 200.0])
@pytest.mark.parametrize("promised", [0.0, 0.3, 2.0])
def test_a_worthless_drafter_loses_a_bounded_time(step_ms, promised):
    """The limit for any prediction: the first credit, a small one for each retry, and the step that exceeded it."""
    step = step_ms / 10 - 1
    time, drafted = lost(Pace(), DraftPromise(promised, step_ms, 10.0), 0.0, 600)
    looks = 6  # pauses of 16, 32, 64, 128, 128, ...
    believed = PRIOR * math.log1p(promised * drafted / PRIOR)  # tokens, until nothing promised is believed
    assert 0 < time <= FIRST_CREDIT + looks * LATER_CREDIT + (looks + 1) * step + believed
    assert drafted < 200


def test_a_drafter_that_pays_never_pauses():
    time, drafted = lost(Pace(), DraftPromise(0.9, 13.0, 10.0), 0.9, 600)
    assert time < 0 and drafted == pytest.approx(600 / 1.9, abs=1)


def test_it_is_tried_again_and_goes_on_where_it_pays():
    pace, good, bad = Pace(), DraftPromise(1.0, 13.0, 10.0), DraftPromise(0.0, 13.0, 10.0)
    for _ in range(50):
        assert pace.drafts(FAIR)
        pace.add(good, 1.0)
    for _ in range(int(MOST_CREDIT / 0.3) + 1):  # what was saved up is limited
        assert pace.drafts(FAIR)
        pace.add(bad, 0.0)
    pauses = []
    for _ in range(5):
        count = 0
        while not pace.drafts(FAIR):
            count += 1
        pauses.append(count)
        pace.add(bad, 0.0)
    assert pauses == [16, 32, 64, 128, LONGEST_PAUSE]
    while not pace.drafts(FAIR):
        pass
    for _ in range(3):
        pace.add(good, 1.0)
        assert pace.drafts(FAIR)


def test_what_can_never_pay_is_not_tried():
    assert not DEAR.can_pay and FAIR.can_pay
    assert not Pace().drafts(DEAR)
    assert Pace().drafts(None)  # sizes that a call names are drafted


@pytest.fixture
def target():
    return make_target()


@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"])
def test_plain_steps_are_plain_generates(target, monkeypatch, tree, settings):
    """No draft is made, and every step is a forward over one token."""
    monkeypatch.setattr(hook, "draft_costs", lambda *_: DEAR)
    monkeypatch.setattr(CoralCandidateGenerator, "propose", None)
    drafter, outputs = make_drafter(target), []
    for extra in ({}, {"assistant_model": drafter}):
        set_seed(3)
        config = config_of({**TREES[tree], "draft_cost_aware": True} if extra else {}, max_new_tokens=20, **settings)
        outputs.append(target.generate(prompt_of(9), generation_config=config, **extra))
    assert torch.equal(*outputs)
    stats = drafter.last_stats
    assert stats.steps == stats.plain_steps == stats.rows[0].plain_steps == 19 and not stats.n_accepted


class Turns:
    """Drafts by turns, so that every step finds another number of features that were put off."""

    pattern = "dpddpppdpdppppppd"

    def __init__(self):
        self.step = 0

    def drafts(self, costs):
        self.step += 1
        return self.pattern[self.step % len(self.pattern)] == "d"

    def add(self, promise, accepted):
        pass


@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize("lengths", [[9], [9, 1, 17]], ids=str)
def test_the_drafter_catches_up(target, monkeypatch, tree, lengths):
    """After plain steps its cache contains the rows that it would have read one by one, so that drafts are the same."""
    monkeypatch.setattr("coral_hf.generation.candidate_generator.Pace", Turns)
    drafter = make_drafter(target)
    sizes = {**TREES[tree], "draft_cost_aware": True}
    monkeypatch.setattr(hook, "draft_costs", lambda *_: FAIR)
    ends = {"eos_token_id": list(range(3, 20))} if len(lengths) > 1 else {}
    _, stats = compare_batch(target, drafter, lengths, sizes, max_new_tokens=24, **ends)
    assert 0 < stats.plain_steps < stats.steps and stats.n_accepted
    assert stats.plain_steps == sum(row.plain_steps for row in stats.rows)


def test_rows_that_were_put_off_are_those_read_at_once(target):
    """With ragged counts and a removed row, the drafter then proposes the same as without a pause."""
    drafter = make_drafter(target)
    settings = DraftSettings(**TREES["tree16"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(128, (3, 24), generator=generator)
    features = torch.randn(3, 23, target.config.hidden_size, dtype=target.dtype, generator=generator)
    starts, steps = [6, 6, 6], [[2, 1, 3], [1, 1, 1], [1, 1, 1], [3, 1, 2]]
    outcomes = []
    for put_off in (True, False):
        drafts = CoralCandidateGenerator(drafter, target, settings, 40, [0, 2, 1])
        lengths, live = list(starts), [0, 1, 2]
        block, counts = features[:, :5], [5, 5, 5]
        for index, new in enumerate(steps):
            if index == 2:
                drafts.keep_rows([2, 1])
                live, lengths, block, counts = [2, 1], [lengths[2], lengths[1]], block[[2, 1]], [counts[2], counts[1]]
            given = ids[live, : max(lengths)]
            if put_off and 0 < index < len(steps) - 1:
                tree = drafts.put_off(given, block, lengths, counts)
                assert tree.tokens[:, 0].tolist() == [
                    int(ids[row, n - 1]) for row, n in zip(live, lengths, strict=True)
                ]
            else:
                tree = drafts.propose(given, block, 5, lengths, counts)
            counts = [new[row] for row in live]
            block = torch.stack(
                [
                    torch.cat([features[r, n - 1 : n - 1 + c], features[r, : 3 - c]])
                    for r, n, c in zip(live, lengths, counts, strict=True)
                ]
            )
            lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        outcomes.append(tree)
    one, other = outcomes
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)
    torch.testing.assert_close(one.scores, other.scores)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_prompt_is_read_in_pieces(target, monkeypatch, rows):
    """The drafts are those after reading it at once."""
    drafter, settings = make_drafter(target), DraftSettings(**TREES["tree16"])
    ids = torch.cat([prompt_of(24, seed=row) for row in range(rows)])
    features = torch.randn(rows, 23, target.config.hidden_size, dtype=target.dtype)
    trees = []
    for piece in (5, 1024):
        monkeypatch.setattr("coral_hf.generation.candidate_generator._PIECE", piece)
        drafts = CoralCandidateGenerator(drafter, target, settings, 40, [0] * rows)
        trees.append(drafts.propose(ids, features))
        assert drafts.cache.length == 23
    assert torch.equal(trees[0].tokens, trees[1].tokens)
    torch.testing.assert_close(trees[0].scores, trees[1].scores)


def test_the_next_turn_of_a_conversation_knows_what_was_put_off(target, monkeypatch):
    """A call that ends in plain steps stores their features with the cache."""
    monkeypatch.setattr("coral_hf.generation.candidate_generator.Pace", Turns)
    monkeypatch.setattr(hook, "draft_costs", lambda *_: FAIR)
    drafter, ids, outputs = make_drafter(target), prompt_of(9), []
    taken = []
    original = kept_rows.take_rows
    monkeypatch.setattr(
        "coral_hf.generation.candidate_generator.take_rows",
        lambda *args: taken.append(original(*args)) or taken[-1],
    )
    sizes = {**TREES["tree16"], "draft_cost_aware": True}
    for extra in ({}, {"assistant_model": drafter}):
        config = config_of(sizes if extra else {}, return_dict_in_generate=True, max_new_tokens=12)
        first = target.generate(ids, generation_config=config, **extra)
        longer = torch.cat([first.sequences, prompt_of(4, seed=8)], dim=1)
        with oracle(outputs[0]) if outputs else oracle(longer):
            second = target.generate(longer, generation_config=config, **cache_kwarg(cache_of(first)), **extra)
        outputs.append(second.sequences)
    assert torch.equal(*outputs)
    read = taken[-1]
    assert read is not None and read.rows.length + read.features.shape[1] >= read.ids.shape[1]
