"""`draft_compile` equals plain `generate`, token for token, in graphs that are compiled once."""

import copy
import pickle

import pytest
import torch
from helpers.batches import padded
from helpers.graphs import compare_graphed, graph_oracle, graphed
from helpers.parity import TREES, Recorder, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target, quick_families
from torch._dynamo.utils import counters

from coral_hf import coral_generate
from coral_hf.generation.compiled.graphs import forget
from coral_hf.utils.compat import cache_kwarg, cache_of


trees = pytest.mark.parametrize("tree", ["chain", "tree16"])


@quick_families
def test_families(family, untraced):
    """Prompts below and beyond the sliding window of 16."""
    target = make_target(family)
    drafter = make_drafter(target)
    for length, tree in ((6, "chain"), (30, "tree16")):
        _, stats = compare_graphed(target, drafter, prompt_of(length), TREES[tree], max_new_tokens=24)
        assert stats.acceptance_length >= 2


@trees
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 20, "eos_token_id": list(range(3, 40))},
        {"max_new_tokens": 3},
        {"max_new_tokens": 1},
        {"do_sample": True, "top_p": 0.9},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_settings(target, tree, settings, untraced):
    compare_graphed(target, make_drafter(target), prompt_of(9), TREES[tree], **settings)


@trees
@pytest.mark.parametrize(
    "settings", [{}, {"eos_token_id": list(range(3, 30))}, {"do_sample": False, "no_repeat_ngram_size": 2}], ids=str
)
def test_batches(target, tree, settings, untraced):
    """Ragged prompts; rows that end leave the text, and their slots in the graphs do nothing."""
    ids, mask = padded([9, 1, 20, 17])
    _, stats = compare_graphed(
        target, make_drafter(target), ids, TREES[tree], attention_mask=mask, max_new_tokens=20, **settings
    )
    assert all(row.steps for row in stats.rows)


@trees
def test_a_conversation_goes_on_from_the_returned_cache(target, tree, untraced):
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}, return_dict_in_generate=True, max_new_tokens=20))
    with graph_oracle(plain.sequences, 0.8):
        config = graphed(TREES[tree], return_dict_in_generate=True, max_new_tokens=20)
        first = target.generate(ids, generation_config=config, assistant_model=drafter)
    assert torch.equal(first.sequences, plain.sequences)
    for ours, theirs in zip(cache_of(first).layers, cache_of(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
    # the drafter's rows, which the next call continues from, equal those of one full forward
    drafts = []
    longer = torch.cat([plain.sequences, prompt_of(4, seed=8)], dim=1)
    for past in (cache_kwarg(cache_of(first)), {}):
        target.generate(
            longer, generation_config=config_of(TREES[tree], max_new_tokens=12), assistant_model=drafter, **past
        )
        drafts.append(drafter.last_stats)
    assert drafts[0] == drafts[1]


def test_hidden_states_scores_and_a_streamer(target, untraced):
    ids, drafter, recorder = prompt_of(9), make_drafter(target), Recorder()
    wanted = dict.fromkeys(["return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"], True)
    plain = target.generate(ids, generation_config=config_of({}, **wanted))
    found = target.generate(
        ids, generation_config=graphed(TREES["tree16"], **wanted), assistant_model=drafter, streamer=recorder
    )
    assert recorder.tokens == plain.sequences[0].tolist()
    torch.testing.assert_close(torch.cat(found.scores), torch.cat(plain.scores))
    for ours, theirs in zip(found.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(torch.cat(ours), torch.cat(theirs))


@pytest.mark.slow
def test_two_hundred_steps_are_two_graphs():
    """For any acceptance: no graph break and no recompilation, in a second call neither."""
    target = make_target()
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}, max_new_tokens=460))
    sizes = {"draft_depth": 2, "draft_top_k": 2, "draft_total_tokens": 6}
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), graph_oracle(plain, 0.6):
        found = target.generate(ids, generation_config=graphed(sizes, max_new_tokens=460), assistant_model=drafter)
        stats = drafter.last_stats
        shorter = graphed(sizes, max_new_tokens=30, max_cache_len=469)  # in a store as long
        again = target.generate(ids, generation_config=shorter, assistant_model=drafter)
    assert torch.equal(found, plain) and torch.equal(again, plain[:, : again.shape[1]])
    assert stats.steps >= 200 and stats.accepted_per_depth[-1] > 5
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [pytest.param(TREES["chain"], marks=pytest.mark.exhaustive), TREES["tree60"]], ids=["chain", "tree60"]
)
def test_batches_are_two_graphs(sizes):
    target = make_target()
    ids, mask = padded([9, 1, 20])
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare_graphed(target, make_drafter(target), ids, sizes, attention_mask=mask, eos_token_id=list(range(3, 12)))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_graphs_are_not_copied_with_their_models(target, untraced):
    drafter, ids = make_drafter(target), prompt_of(9)
    coral_generate(target, drafter, input_ids=ids, max_new_tokens=5, draft_compile=True)
    for model in (target, drafter):
        assert model._coral_graphs
        assert not copy.deepcopy(model)._coral_graphs and not pickle.loads(pickle.dumps(model))._coral_graphs
        forget(model)
        assert not hasattr(model, "_coral_graphs")


def test_weights_that_change_are_read_anew(target, untraced):
    drafter, ids = make_drafter(target), prompt_of(9)
    for seed in (0, 5):
        target.load_state_dict(make_target(seed=seed).state_dict())
        compare_graphed(target, drafter, ids, TREES["tree16"], max_new_tokens=12)


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["chain", pytest.param("tree8", marks=pytest.mark.exhaustive)])
def test_compiled_by_inductor_in_float32(tree):
    """With a real backend: the same tokens, from two graphs."""
    target = make_target(dtype=torch.float32)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        _, stats = compare_graphed(target, make_drafter(target), prompt_of(9), TREES[tree], compile_config=None)
    assert stats.acceptance_length >= 2
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
