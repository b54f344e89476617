"""Prompts with a cache, with padding and in chunks: the drafter has read the same tokens as the target."""

import weakref

import pytest
import torch
from helpers.drafted_calls import DRAFTS, both, drafts
from helpers.parity import CHAIN, config_of, prompt_of
from helpers.tiny_models import every_family, make_drafter, make_target
from transformers import DynamicCache

from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.target_forward import TargetForward
from coral_hf.utils.compat import cache_kwarg, cache_of


@drafts
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_prefilled_cache(draft, family):
    """A cache of the prompt's first part, in another layout than the config's: windows apply nevertheless."""
    target = make_target(family)
    drafter, ids = make_drafter(target), prompt_of(30)

    def cache(past=20):
        filled = DynamicCache()
        if past:
            target(ids[:, :past], use_cache=True, **cache_kwarg(filled))
        return filled

    both(target, drafter, draft, ids, cache=cache)
    both(target, drafter, draft, ids, cache=lambda: cache(0))


@drafts
@pytest.mark.parametrize("new", [1, 3, 12])
def test_a_padded_conversation_continued_with_its_new_tokens(target, draft, new):
    """The mask covers the cache, but the ids do not: the drafter never sees the padding there."""
    drafter, mask = make_drafter(target), (torch.arange(15) >= 6).long()[None]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), prompt_of(9)], dim=1)

    def cache():
        filled = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        target(padded, attention_mask=mask, position_ids=positions, use_cache=True, **cache_kwarg(filled))
        return filled

    whole = torch.cat([mask, mask.new_ones(1, new)], dim=1)
    both(target, drafter, draft, prompt_of(new, seed=8), cache=cache, attention_mask=whole)


@drafts
def test_the_cache_of_a_padded_call_goes_into_the_next(target, draft):
    """It is as long as that of plain `generate`, padding included, and contains the same keys."""
    drafter, padded = make_drafter(target), torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt_of(9)], dim=1)
    settings = {"attention_mask": (torch.arange(14) >= 5).long()[None], "return_dict_in_generate": True}
    plain, drafted = both(target, drafter, draft, padded, **settings)
    for ours, theirs in zip(cache_of(drafted).layers, cache_of(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-6, atol=1e-6)


@drafts
def test_left_padding_and_own_positions(target, draft):
    drafter = make_drafter(target)
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt_of(9)], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    both(target, drafter, draft, ids, attention_mask=mask, repetition_penalty=1.2)
    both(target, drafter, draft, ids, position_ids=torch.arange(13)[None] + 7)


@drafts
@every_family
def test_prefill_in_chunks(draft, family):
    """Also with padding and after a prefilled cache; the states are the last chunk's, as in plain `generate`."""
    target = make_target(family)
    drafter, ids = make_drafter(target, target_feature_layers=[1, -1]), prompt_of(25)
    lengths = []
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def cache():
        filled = DynamicCache()
        target(input_ids=ids[:, :9], use_cache=True, **cache_kwarg(filled))
        return filled

    settings = {"prefill_chunk_size": 7, "return_dict_in_generate": True, "output_hidden_states": True}
    plain, drafted = both(target, drafter, draft, ids, **settings)
    assert torch.equal(drafted.sequences, target.generate(ids, generation_config=config_of({})))
    for ours, theirs in zip(drafted.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    both(target, drafter, draft, ids, attention_mask=(torch.arange(25) >= 4).long()[None], **settings)
    # Transformers 5.17 reads the whole prompt again there: what counts is the text
    lengths.clear()
    config = config_of(DRAFTS[draft], prefill_chunk_size=7)
    continued = target.generate(ids, generation_config=config, assistant_model=drafter, **cache_kwarg(cache()))
    assert torch.equal(continued, plain.sequences) and lengths[:4] == [9, 7, 7, 2]
    handle.remove()


def test_prefill_in_chunks_is_the_drafter_s_too(target):
    """It reads the features of all chunks: drafts equal those after a prefill in one piece."""
    drafter, stats = make_drafter(target, target_feature_layers=[1, -1]), []
    for size in (None, 4):
        target.generate(
            prompt_of(25), generation_config=config_of(CHAIN, prefill_chunk_size=size), assistant_model=drafter
        )
        stats.append(drafter.last_stats)
    assert stats[0] == stats[1]


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_bad_chunks_are_refused(target, size):
    with pytest.raises(ValueError, match=f"prefill_chunk_size={size}"):
        config = config_of(CHAIN, prefill_chunk_size=size)
        target.generate(prompt_of(9), generation_config=config, assistant_model=make_drafter(target))


@drafts
def test_states_of_a_prompt_are_not_kept(target, draft):
    """The drafter reads few layers: the states of the others are freed before the first draft is verified."""
    drafter, kept, alive = make_drafter(target, target_feature_layers=[1, 2]), [], []
    before = target.register_forward_pre_hook(lambda *_: alive.append([state() is not None for state in kept]))
    after = target.register_forward_hook(
        lambda *args: kept.extend(weakref.ref(state) for state in args[-1].hidden_states if state is not None)
    )
    target.generate(prompt_of(9), generation_config=config_of(DRAFTS[draft]), assistant_model=drafter)
    before.remove(), after.remove()
    assert alive[0] == [] and alive[1] and not any(alive[1])


@drafts
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_mask_without_padding_is_dropped(draft, family):
    """Some releases of Transformers pass a mask, which would grow with every step. With padding it is kept."""
    target = make_target(family)
    drafter, ids, outputs = make_drafter(target), prompt_of(20), []
    for mask in (None, torch.ones_like(ids), (torch.arange(20) >= 3).long()[None]):
        verifier = TargetForward(target, {**cache_kwarg(DynamicCache(config=target.config)), "attention_mask": mask})
        with torch.no_grad():
            prefilled, features = verifier.prefill(ids, target.generation_config, lambda states: states[-1])
            assert (verifier.mask is None) == (mask is None or bool(mask.all()))
            settings = DraftSettings.resolve(drafter.config, config_of(DRAFTS[draft]))
            generator = CoralCandidateGenerator(drafter, target, settings, 40, verifier.num_padding)
            token = prefilled.logits[:, -1].argmax(-1, keepdim=True)
            tree = generator.propose(torch.cat([ids, token], dim=1), features)
            outputs.append(verifier.verify(tree).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[2])
