"""The attention that verifies a tree equals eager attention with the tree's mask, and is only used for that."""

import threading

import pytest
import torch
from helpers.tiny_models import FAMILIES, make_drafter, make_target
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coral_hf.generation.attention import verifying as module
from coral_hf.generation.attention.grouped import joined_attention, masked_attention, softmax_attention
from coral_hf.generation.attention.verifying import replaces_attention, verifying
from coral_hf.generation.draft_tree import DraftTree, ancestors_of
from coral_hf.generation.key_values.paths import takes_tree_masks
from coral_hf.generation.target_forward import TargetForward
from coral_hf.utils.compat import cache_kwarg


PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2, 5]])


def a_tree(vocab_size: int) -> DraftTree:
    depths = torch.tensor([[0, 1, 1, 2, 2, 2, 3]])
    tokens = torch.arange(3, 10)[None] % vocab_size
    return DraftTree(tokens, PARENTS, depths, depths.float(), ancestors_of(PARENTS, 3))


@pytest.mark.parametrize("form", [softmax_attention, joined_attention, masked_attention])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_forms_equal_plain_products(form, heads, kv_heads, batch):
    torch.manual_seed(0)
    # rows in the order in which a projection leaves them
    query = torch.randn(batch, 7, heads, 16).transpose(1, 2)
    key, value = torch.randn(2, batch, kv_heads, 30, 16)
    among = torch.zeros(1, 1, 7, 7).masked_fill(~ancestors_of(PARENTS, 3), torch.finfo(torch.float32).min)
    mask = torch.cat([torch.zeros(1, 1, 7, 23), among], dim=-1)
    repeated = [states.repeat_interleave(heads // kv_heads, dim=1).double() for states in (key, value)]
    scores = 0.3 * query.double() @ repeated[0].transpose(2, 3) + mask
    expected = (scores.softmax(-1) @ repeated[1]).transpose(1, 2).float()
    found = form(query, key, value, mask if form is masked_attention else among, 0.3)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_verifies_as_eager_attention_does(family, long, monkeypatch):
    """After a prefix longer than the sliding windows, in the store and in a dynamic cache."""
    monkeypatch.setattr(module, "_LONG", 0 if long else 1000)
    logits = []
    for attention in ("eager", "sdpa"):
        target = make_target(family, attention=attention)
        ids = torch.arange(40)[None] * 7 % target.config.vocab_size
        for in_store in (False, True):
            with torch.no_grad():
                cache = DynamicCache(config=target.config)
                cache.activate_past_recording()
                target(input_ids=ids, use_cache=True, **cache_kwarg(cache))
                cache.crop(0)
                verifier = TargetForward(target, cache_kwarg(cache))
                if in_store:
                    verifier.enter_store([0])
                assert replaces_attention(target) == (attention == "sdpa")
                logits.append(verifier.verify(a_tree(target.config.vocab_size)).logits)
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], atol=1e-4, rtol=1e-3)  # eager's softmax is in float32
    torch.testing.assert_close(logits[3], logits[2], atol=1e-9, rtol=1e-9)


def test_is_there_while_a_tree_is_verified_only():
    """Also after an error, and in one thread only: the attention in other threads is unchanged."""
    target, own = make_target(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    ids, mask = torch.tensor([[5, 9, 3]]), torch.zeros(1, 1, 3, 3, dtype=torch.float64)  # which sees what comes after
    with torch.no_grad():
        expected = target(ids, attention_mask=mask).logits
        with pytest.raises(ZeroDivisionError), verifying(target, [True] * 4):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
            with verifying(target, [True] * 4):
                pass
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
            found: list[torch.Tensor] = []

            def other():
                with torch.no_grad():
                    found.append(target(ids, attention_mask=mask).logits)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert torch.equal(found[0], expected)
            1 / 0  # noqa: B018
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own and not module._own


def test_flash_attention_takes_trees_where_nothing_else_changes_its_scores():
    target = make_target()
    target.config._attn_implementation = "flash_attention_2"
    assert replaces_attention(target) and takes_tree_masks(target)
    target.config.attn_logit_softcapping = 30.0
    assert not replaces_attention(target) and not takes_tree_masks(target)
    target.config.attn_logit_softcapping = None
    target.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert not takes_tree_masks(target)
    target.config._attn_implementation = "flex_attention"
    assert not takes_tree_masks(target)


def test_a_compiled_target_is_left_alone():
    target = make_target()
    target.forward = torch.compile(target.forward, backend="eager")
    assert not replaces_attention(target) and takes_tree_masks(target)


def test_generation_verifies_with_it(monkeypatch):
    """Every forward over a tree uses it; the prefill does not."""
    target = make_target()
    calls: list[int] = []
    attend = module._attend
    monkeypatch.setattr(module, "_attend", lambda query, *rest: calls.append(query.shape[2]) or attend(query, *rest))
    drafter = make_drafter(target)
    ids = torch.tensor([[5, 9, 3, 7]])
    target.generate(ids, max_new_tokens=12, assistant_model=drafter)
    assert len(calls) == 4 * drafter.last_stats.steps
