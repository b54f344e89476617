"""A conversation continued with the target's cache: the drafter continues too, and drops its rows when it must."""

import gc
import weakref

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target
from transformers import DynamicCache

from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.key_values import kept_rows as read_rows
from coral_hf.utils.compat import cache_kwarg, cache_of


SIZES = {"chain": CHAIN, "tree16": TREES["tree16"]}
sizes = pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))


@pytest.fixture
def drafts(monkeypatch):
    """The tokens of every tree that is proposed."""
    proposed, propose = [], CoralCandidateGenerator.propose

    def spy(self, *args, **kwargs):
        proposed.append(propose(self, *args, **kwargs))
        return proposed[-1]

    monkeypatch.setattr(CoralCandidateGenerator, "propose", spy)
    return proposed


def answer(target, drafter, ids, size, cache=None, **settings):
    config = config_of(size, return_dict_in_generate=True, **{"max_new_tokens": 12, **settings})
    extra = {} if cache is None else cache_kwarg(cache)
    return target.generate(ids, generation_config=config, assistant_model=drafter, **extra)


def next_turn(output, seed=8):
    return torch.cat([output.sequences, prompt_of(5, seed)], dim=1)


@sizes
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_later_turns_draft_what_they_draft_without_the_cache(size, family, drafts):
    target = make_target(family)
    drafter, ids, cache = make_drafter(target, target_feature_layers=[1, -1]), prompt_of(30), None
    for turn in range(4):
        plain = target.generate(ids, generation_config=config_of({}, max_new_tokens=12))
        proposed = []
        for given in (None, cache):
            drafts.clear()
            with oracle(plain, 0.0) if turn == 2 else torch.no_grad():  # drafts that are all wrong, too
                output = answer(target, drafter, ids, size, given)
            assert torch.equal(output.sequences, plain)
            proposed.append([tree.tokens for tree in drafts])
        assert turn == 0 or cache_of(output) is cache
        for cold, warm in zip(*proposed, strict=True):
            torch.testing.assert_close(cold, warm)
        cache, ids = cache_of(output), next_turn(output, seed=turn)


@sizes
def test_accepted_drafts_are_read_once(target, size, drafts):
    """Also where the text ends inside an accepted run."""
    drafter, ids = make_drafter(target), prompt_of(9)
    for length in range(6, 14):
        plain = target.generate(ids, generation_config=config_of({}, max_new_tokens=length))
        with oracle(plain, 0.9):
            first = answer(target, drafter, ids, size, max_new_tokens=length)
        longer, proposed = next_turn(first), []
        for cache in (None, cache_of(first)):
            drafts.clear()
            answer(target, drafter, longer, size, cache)
            proposed.append([tree.tokens for tree in drafts])
        assert all(torch.equal(*trees) for trees in zip(*proposed, strict=True))


def another_text(target, cache, ids):
    cache.reset()
    target(input_ids=prompt_of(ids.shape[1] - 1, seed=5), use_cache=True, **cache_kwarg(cache))
    return torch.cat([prompt_of(ids.shape[1] - 1, seed=5), prompt_of(4)], dim=1)


def cropped(target, cache, ids):
    cache.crop(-7)
    return torch.cat([ids[:, :-8], prompt_of(4)], dim=1)


def emptied(target, cache, ids):
    cache.reset()
    return torch.cat([ids, prompt_of(4)], dim=1)


def grown(target, cache, ids):
    target(input_ids=ids[:, -1:], use_cache=True, **cache_kwarg(cache))
    return torch.cat([ids, prompt_of(4)], dim=1)


def cropped_and_grown(target, cache, ids):
    """As long as before, in another text."""
    cache.crop(-6)
    other = torch.cat([ids[:, :-7], prompt_of(6, seed=4)], dim=1)
    target(input_ids=other[:, -6:], use_cache=True, **cache_kwarg(cache))
    return torch.cat([other, prompt_of(3)], dim=1)


@sizes
@pytest.mark.parametrize("harm", [another_text, cropped, emptied, grown, cropped_and_grown])
def test_what_happens_to_the_cache_between_turns(target, size, harm):
    drafter, ids = make_drafter(target), prompt_of(9)
    first = answer(target, drafter, ids, size)
    with torch.no_grad():
        longer = harm(target, cache_of(first), first.sequences)
    plain = target.generate(longer, generation_config=config_of({}, max_new_tokens=12))
    with oracle(plain):
        second = answer(target, drafter, longer, size, cache_of(first))
    assert torch.equal(second.sequences, plain) and drafter.last_stats.n_accepted > 0
    again = answer(target, drafter, next_turn(second), size, cache_of(second))
    assert torch.equal(
        again.sequences, target.generate(next_turn(second), generation_config=config_of({}, max_new_tokens=12))
    )


def taken(drafter, output):
    ids, cache = output.sequences, cache_of(output)
    return read_rows.take_rows(cache, drafter, ids, ids.shape[1] - 1, 0)


def test_other_drafters_and_other_weights_start_anew(target):
    drafter, ids = make_drafter(target), prompt_of(9)
    assert taken(drafter, answer(target, drafter, ids, CHAIN)) is not None
    assert taken(make_drafter(target), answer(target, drafter, ids, CHAIN)) is None
    output = answer(target, drafter, ids, CHAIN)
    with torch.no_grad():
        next(drafter.layer.parameters()).add_(0.1)
    assert taken(drafter, output) is None
    output = answer(target, drafter, ids, CHAIN)
    drafter.float()
    assert taken(drafter, output) is None
    assert answer(target, drafter, next_turn(output), CHAIN, cache_of(output)).sequences.shape[1] == 38


def test_nothing_is_kept_of_a_cache_that_is_gone(target):
    drafter, ids = make_drafter(target), prompt_of(9)
    gc.collect()
    before = len(read_rows._kept)
    output = answer(target, drafter, ids, CHAIN)
    rows = weakref.ref(read_rows._kept[cache_of(output)][2].rows)
    assert len(read_rows._kept) == before + 1
    del output
    gc.collect()
    assert rows() is None and len(read_rows._kept) == before
    target.generate(ids, generation_config=config_of(CHAIN), assistant_model=drafter)
    gc.collect()
    assert len(read_rows._kept) == before


@sizes
def test_padding_and_new_tokens_alone(target, size):
    """With the same padding the drafter continues; with only the new ids it starts there. The text is the same."""
    drafter, padding = make_drafter(target), torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([padding, prompt_of(9)], dim=1)
    cache = DynamicCache(config=target.config)
    texts = []
    for assistant in (None, drafter):
        cache, text = DynamicCache(config=target.config), ids
        for seed in range(3):
            text = torch.cat([text, prompt_of(3, seed)], dim=1)
            mask = (text > 0).long()
            mask[:, 4:] = 1
            new = text[:, cache.get_seq_length() :] if seed == 2 else text
            extra = {"assistant_model": assistant} if assistant else {}
            config = config_of(size if assistant else {}, max_new_tokens=8)
            made = target.generate(new, attention_mask=mask, generation_config=config, **extra, **cache_kwarg(cache))
            text = torch.cat([text, made[:, new.shape[1] :]], dim=1)
        texts.append(text)
    assert torch.equal(*texts)
