"""Targets with recurrent layers: chains and trees say what plain `generate` says, with one forward of the target a step."""

from itertools import pairwise

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, Recorder, assert_refused, compare, config_of, prompt_of
from helpers.recurrent_targets import HYBRIDS, STATES, make_hybrid
from helpers.tiny_models import make_drafter, make_tokenizer
from helpers.unusual_targets import RECURRENT, build
from transformers import DynamicCache, set_seed

import coral_hf
from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.utils.compat import cache_kwarg, cache_of


# Of the forms that Transformers' recurrences take: a gated delta rule, two of Mamba 2 (one beside attention in each layer),
# Mamba 1, whose forward over several tokens forgets its state. CI takes these; `-m ""` takes all families.
QUICK = ("qwen3_5_text", "falcon_h1", "nemotron_h", "jamba")


def marked(family):
    if family == QUICK[0]:
        return family
    return pytest.param(family, marks=pytest.mark.slow if family in QUICK else pytest.mark.exhaustive)


every_state = pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in STATES]
)
some = pytest.mark.parametrize("family", [marked(name) for name in HYBRIDS])
sizes = pytest.mark.parametrize("size", [CHAIN, TREES["tree16"]], ids=["chain", "tree16"])
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20}


def rejections(stats) -> list[int]:
    """Steps that accepted exactly 0, 1, ... drafts."""
    return [here - further for here, further in pairwise([stats.steps, *stats.accepted_per_depth, 0])]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "family", [name if name == QUICK[0] else pytest.param(name, marks=pytest.mark.exhaustive) for name in STATES]
)
def test_chains(family, settings):
    """Random drafts and mostly right ones, for prompts of 1, 20 and 300 tokens, with rejections at every depth."""
    target = make_hybrid(family)
    drafter = make_drafter(target)
    found = [0] * 6
    for length in (1, 20, 300):
        for probability in (0.5, 0.9):
            plain, stats = compare(
                target, drafter, prompt_of(length), CHAIN, probability, max_new_tokens=60, **settings
            )
            assert plain[0, length:].unique().numel() > 10
            counts = [*rejections(stats), *[0] * 6]
            found = [total + count for total, count in zip(found, counts, strict=False)]
    assert all(found), found


@sizes
@every_state
def test_one_forward_of_the_target_a_step(family, size):
    """It equals that of plain `generate`, whatever is drafted."""
    target, ids = make_hybrid(family), prompt_of(20)
    drafter = make_drafter(target)
    plain = target.generate(ids, generation_config=config_of({}, max_new_tokens=24))
    for probability in (0.0, 0.7):
        forwards = []
        handle = target.register_forward_pre_hook(lambda *_, counted=forwards: counted.append(1))
        with oracle(plain, probability):
            config = config_of(size, max_new_tokens=24)
            assert torch.equal(target.generate(ids, generation_config=config, assistant_model=drafter), plain)
        handle.remove()
        assert len(forwards) == 1 + drafter.last_stats.steps
    assert drafter.last_stats.n_accepted > drafter.last_stats.steps


@pytest.mark.slow
@every_state
@pytest.mark.parametrize("size", [pytest.param("tree8", marks=pytest.mark.exhaustive), "tree32"])
def test_trees(family, size):
    target = make_hybrid(family)
    drafter = make_drafter(target)
    for length, settings in ((1, {}), (20, SAMPLED)):
        plain, stats = compare(target, drafter, prompt_of(length), TREES[size], **settings)
        assert stats.n_accepted > stats.steps and plain[0, length:].unique().numel() > 8


@some
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(family, attention):
    target = make_hybrid(family, attention=attention)
    _, stats = compare(target, make_drafter(target), prompt_of(20), TREES["tree16"])
    assert stats.n_accepted > stats.steps


@sizes
@some
def test_continued_conversations(family, size):
    """In a returned cache and in one that a user filled. Afterwards it equals that of plain `generate`."""
    target = make_hybrid(family)
    drafter, ids, cache, plain_cache = make_drafter(target), prompt_of(9), None, None
    for turn in range(3):
        given = {} if cache is None else cache_kwarg(cache)
        # continued in the same way: several tokens after a state may be read otherwise than single ones
        continued = {} if plain_cache is None else cache_kwarg(plain_cache)
        config = config_of({}, max_new_tokens=13, return_dict_in_generate=True)
        output = target.generate(ids, generation_config=config, **continued)
        plain, plain_cache = output.sequences, cache_of(output)
        with oracle(plain, (0.7, 0.0, 0.9)[turn]):
            config = config_of(size, max_new_tokens=13, return_dict_in_generate=True)
            output = target.generate(ids, generation_config=config, assistant_model=drafter, **given)
        assert torch.equal(output.sequences, plain), turn
        cache = cache_of(output)
        expected = DynamicCache(config=target.config)
        known = output.sequences[:, : cache.get_seq_length()]
        assert known.shape[1] in (output.sequences.shape[1] - 1, output.sequences.shape[1])
        if turn == 0:
            step(target, known[:, :9], expected)
            for column in range(9, known.shape[1]):
                step(target, known[:, column : column + 1], expected)
            for layer, other in zip(cache.layers, expected.layers, strict=True):
                assert not getattr(layer, "record_past", False)
                for name in ("conv_states", "recurrent_states"):
                    for index, state in getattr(layer, name, {}).items():
                        torch.testing.assert_close(state, getattr(other, name)[index], atol=1e-5, rtol=1e-5)
        ids = torch.cat([output.sequences, prompt_of(5, turn)], dim=1)


def step(target, ids, cache):
    start = cache.get_seq_length()
    with torch.no_grad():
        positions = torch.arange(start, start + ids.shape[1])[None]
        return target(input_ids=ids, position_ids=positions, use_cache=True, **cache_kwarg(cache))


@some
def test_caches_that_plain_generate_filled(family):
    target, ids = make_hybrid(family), prompt_of(12)
    drafter = make_drafter(target)
    config = config_of({}, max_new_tokens=9, return_dict_in_generate=True)
    texts = []
    for assistant in (None, drafter):
        first = target.generate(ids, generation_config=config)
        longer = torch.cat([first.sequences, prompt_of(4, 7)], dim=1)
        extra = {} if assistant is None else {"assistant_model": drafter}
        config_here = config_of({} if assistant is None else CHAIN, max_new_tokens=20)
        texts.append(target.generate(longer, generation_config=config_here, **cache_kwarg(cache_of(first)), **extra))
    assert torch.equal(*texts)


@some
@sizes
def test_left_padding(family, size):
    target, ids = make_hybrid(family, attention="sdpa"), prompt_of(20)  # eager is NaN at padding in float64
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    plain, stats = compare(target, make_drafter(target), ids, size, attention_mask=mask)
    assert stats.n_accepted > stats.steps and plain[0, 20:].unique().numel() > 10


@some
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_prefill_in_chunks(family, chunk):
    target = make_hybrid(family)
    _, stats = compare(target, make_drafter(target), prompt_of(33), CHAIN, prefill_chunk_size=chunk)
    assert stats.n_accepted > stats.steps


@some
def test_every_stop_condition(family):
    target, ids = make_hybrid(family), prompt_of(20)
    drafter, tokenizer = make_drafter(target), make_tokenizer()
    whole = target.generate(ids, generation_config=config_of({}))[0, 20:]
    text = tokenizer.decode(whole[12:15])
    for settings in (
        {"eos_token_id": int(whole[11])},
        {"eos_token_id": [int(whole[17]), 127]},
        {"stop_strings": [text]} if text else {},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ):
        extra = {"tokenizer": tokenizer} if "stop_strings" in settings else {}
        plain, _ = compare(target, drafter, ids, CHAIN, 0.95, **settings, **extra)
        assert plain.shape[1] < 20 + 40 or not settings


@some
def test_scores_states_and_a_streamer(family):
    target, ids = make_hybrid(family), prompt_of(20)
    drafter = make_drafter(target)
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    plain = target.generate(ids, generation_config=config_of({}, **settings))
    streamer = Recorder()
    with oracle(plain.sequences):
        drafted = target.generate(ids, generation_config=config_of(CHAIN, **settings), assistant_model=drafter)
        config = config_of(CHAIN)
        target.generate(ids, generation_config=config, assistant_model=drafter, streamer=streamer)
    assert streamer.tokens == plain.sequences[0].tolist()
    for ours, theirs in zip(drafted.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drafted.hidden_states[-1][-1], plain.hidden_states[-1][-1], atol=1e-4, rtol=1e-4)


@some
def test_an_attached_drafter(family):
    target, ids = make_hybrid(family), prompt_of(20)
    drafter = make_drafter(target)
    plain = target.generate(ids, generation_config=config_of({}))
    with coral_hf.attach(target, drafter, **CHAIN), oracle(plain):
        set_seed(0)
        assert torch.equal(target.generate(ids, generation_config=config_of({})), plain)
    assert drafter.last_stats.n_accepted > drafter.last_stats.steps


@pytest.mark.parametrize("size", [CHAIN, TREES["tree16"]], ids=["chain", "tree"])
@pytest.mark.parametrize("family", list(RECURRENT))
def test_targets_without_attention_are_refused(family, size):
    target = build(family, RECURRENT[family])
    drafter = CoralDraftModel(CoralDraftConfig.from_target(target.config)).double()
    assert_refused(target, drafter, size, "Generate without assistant_model")
