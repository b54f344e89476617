"""With looked-up nodes the tokens equal plain `generate`'s, and repetitive text takes fewer steps."""

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, compare, config_of, prompt_of
from helpers.recurrent_targets import make_hybrid
from helpers.tiny_models import make_drafter, make_target, quick_families

from coral_hf.generation import hook
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.tree_size import DraftCosts
from coral_hf.utils.compat import cache_of


SIZES = {"tree": {**TREES["tree16"], "draft_lookup": True}, "chain": {**CHAIN, "draft_lookup": True}}
AWARE = {**SIZES["tree"], "draft_cost_aware": True}
FAIR = DraftCosts(tuple(10.0 + 0.1 * n for n in range(1, 65)), 1.0, 0.5)
DEAR = DraftCosts(tuple(10.0 + 0.1 * n for n in range(1, 65)), 1000.0, 1000.0)  # drafting never pays, verifying does


def repeated(length: int = 40, period: int = 9, seed: int = 3) -> torch.Tensor:
    return prompt_of(period, seed).repeat(1, -(-length // period))[:, :length]


@quick_families
@pytest.mark.parametrize("name", ["tree", pytest.param("chain", marks=pytest.mark.slow)])
def test_parity(family, name):
    target = make_target(family)
    drafter = make_drafter(target)
    for ids in (repeated(), repeated(20, 3), prompt_of(24)):
        compare(target, drafter, ids, SIZES[name])
    compare(target, drafter, repeated(), SIZES[name], do_sample=True, temperature=0.5)
    compare(target, drafter, repeated(), SIZES[name], repetition_penalty=1.3)
    compare(target, drafter, repeated(), SIZES[name], eos_token_id=list(range(3, 20)), max_new_tokens=30)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", pytest.param("falcon_h1", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", list(SIZES))
def test_parity_of_recurrent_targets(family, name):
    target = make_hybrid(family)
    drafter = make_drafter(target)
    for ids in (repeated(), repeated(20, 3)):
        compare(target, drafter, ids, SIZES[name], max_new_tokens=60)


@pytest.mark.slow
@pytest.mark.parametrize("costs", [FAIR, DEAR], ids=["fair", "dear"])
def test_parity_by_costs(costs, monkeypatch):
    monkeypatch.setattr(hook, "draft_costs", lambda *args: costs)
    target = make_target("gemma3_text")
    drafter = make_drafter(target)
    for ids in (repeated(), repeated(20, 3)):
        compare(target, drafter, ids, AWARE, max_new_tokens=60)
    assert drafter.last_stats.lookup_steps > 0


@pytest.mark.parametrize("sizes", [SIZES["tree"], SIZES["chain"], AWARE], ids=["tree", "chain", "aware"])
def test_batches(sizes, monkeypatch):
    """Rows with and without repetition, of several lengths: their features wait together where no step drafts."""
    monkeypatch.setattr(hook, "draft_costs", lambda *args: FAIR)
    target = make_target()
    drafter = make_drafter(target)
    prompts = [repeated(30), repeated(12, 3), prompt_of(20)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (30 - prompt.shape[1], 0)) for prompt in prompts])
    _, stats = compare(target, drafter, ids, sizes, attention_mask=(ids > 0).long(), max_new_tokens=60)
    assert all(row.n_accepted > 0 for row in stats.rows)
    compare(target, drafter, ids[:2], sizes, attention_mask=(ids[:2] > 0).long(), repetition_penalty=1.2)


def generate(target, drafter, ids, sizes, **settings):
    return target.generate(ids, generation_config=config_of(sizes, **settings), assistant_model=drafter)


def looping_target():
    """Its greedy text soon repeats itself: every token follows from the one before alone."""
    target = make_target()
    with torch.no_grad():
        for layer in target.get_decoder().layers:
            layer.self_attn.o_proj.weight.zero_()
    return target


@pytest.mark.parametrize("name", list(SIZES))
def test_a_text_that_repeats_itself_takes_fewer_steps(name):
    target = looping_target()
    drafter = make_drafter(target)  # random: every accepted token was looked up
    settings = {"max_new_tokens": 80}
    without = {**SIZES[name], "draft_lookup": False}
    plain = target.generate(prompt_of(8), generation_config=config_of({}, **settings))
    assert torch.equal(generate(target, drafter, prompt_of(8), without, **settings), plain)
    before = drafter.last_stats
    assert torch.equal(generate(target, drafter, prompt_of(8), SIZES[name], **settings), plain)
    stats = drafter.last_stats
    assert before.lookup_steps == 0 and stats.lookup_steps > 0
    if name == "chain":  # as long as a drafted one, which here soon is right as well
        assert stats.steps <= before.steps
    else:
        assert stats.steps < 0.6 * before.steps
        assert len(stats.accepted_per_depth) > 5 and stats.accepted_per_depth[5] > 0, "deeper than it drafts"


def test_steps_without_a_draft_do_not_call_the_drafter(monkeypatch):
    target = looping_target()
    drafter = make_drafter(target)
    calls, reads = [], []
    original = CoralCandidateGenerator.propose

    def propose(self, input_ids, *args):
        calls.append(input_ids.shape[1])
        found = original(self, input_ids, *args)
        reads.append(self.cache.length)
        return found

    monkeypatch.setattr(CoralCandidateGenerator, "propose", propose)
    generate(target, drafter, prompt_of(8), SIZES["tree"], max_new_tokens=80)
    stats = drafter.last_stats
    assert len(calls) == stats.steps - stats.lookup_steps < stats.steps
    # whatever was put off is read before the next draft: true rows of all tokens but the root
    assert reads == [length - 1 for length in calls]


def test_the_whole_cache_is_plain_generates():
    target = looping_target()
    drafter = make_drafter(target)
    settings = {"max_new_tokens": 60, "return_dict_in_generate": True}
    plain = target.generate(prompt_of(8), generation_config=config_of({}, **settings))
    drafted = generate(target, drafter, prompt_of(8), SIZES["tree"], **settings)
    assert torch.equal(drafted.sequences, plain.sequences) and drafter.last_stats.lookup_steps
    for ours, theirs in zip(cache_of(drafted).layers, cache_of(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_a_good_drafter_loses_nothing_to_it():
    """On a text without repetition, as many tokens are accepted, and every step has a draft."""
    target = make_target("qwen3")
    drafter = make_drafter(target)
    ids = prompt_of(24, seed=5)
    plain = target.generate(ids, generation_config=config_of({}, max_new_tokens=60, repetition_penalty=1.8))
    found = {}
    for lookup in (False, True):
        with oracle(plain, 0.9):
            sizes = {**SIZES["tree"], "draft_lookup": lookup}
            assert torch.equal(generate(target, drafter, ids, sizes, max_new_tokens=60, repetition_penalty=1.8), plain)
        found[lookup] = drafter.last_stats
    assert found[True].acceptance_length >= 0.95 * found[False].acceptance_length
