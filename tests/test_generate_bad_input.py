"""Calls, targets and caches that a drafter cannot be used with: a `ValueError` that names the value."""

import pytest
import torch
from conftest import make_drafter, make_target
from parity import STOCK, config_of, prompt_of
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from coral_hf.compat import cache_kwarg, cache_of


BAD_CALLS = {
    "batch": ({}, {"ids": torch.full((2, 5), 7)}, "batch"),
    "beams": ({}, {"num_beams": 2}, "num_beams|beam"),
    "depth": ({"draft_depth": 0}, {}, "draft_depth=0"),
    "negative": ({"draft_top_k": -1}, {}, "draft_top_k=-1"),
    "total": ({"draft_depth": 2, "draft_top_k": 2, "draft_total_tokens": 60}, {}, "draft_total_tokens=60"),
    "unknown": ({"draft_width": 3}, {}, "draft_width"),
    "cost-aware": ({"draft_cost_aware": "yes"}, {}, "draft_cost_aware='yes'"),
    "stock tree": ({"draft_stock_loop": True, "draft_top_k": 2}, {}, "draft_top_k=1"),
    "static cache": ({}, {"cache_implementation": "static"}, "[Ss]tatic"),
    "no cache": ({}, {"use_cache": False}, "use_cache=True"),
    "attentions": ({}, {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
}


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_calls(target, case):
    """Each is a `ValueError` that names the value, before any forward."""
    tree, settings, message = BAD_CALLS[case]
    settings = dict(settings)
    ids = settings.pop("ids", prompt_of(5))
    with pytest.raises(ValueError, match=message):
        target.generate(ids, generation_config=config_of(tree, **settings), assistant_model=make_drafter(target))


def test_wrong_targets():
    drafter = make_drafter(make_target())
    for change in ({"vocab_size": 256}, {"hidden_size": 64}, {"num_hidden_layers": 2}):
        other = AutoModelForCausalLM.from_config(LlamaConfig(**{**_llama(), **change}), dtype=torch.float64)
        with pytest.raises(ValueError, match=next(iter(change))):
            other.generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)
    with pytest.raises(ValueError, match="model_type"):
        make_target("qwen2").generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)


def _llama() -> dict:
    return {key: value for key, value in make_target().config.to_dict().items() if key in LlamaConfig().to_dict()}


def test_inputs_embeds_are_refused(target):
    embeds = target.get_input_embeddings()(prompt_of(5))
    with pytest.raises(ValueError, match="input_ids"):
        target.generate(inputs_embeds=embeds, max_new_tokens=5, assistant_model=make_drafter(target))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda target: setattr(target, "_supports_default_dynamic_cache", lambda: False), "keeps no KV cache"),
        (lambda target: target.model.embed_tokens.to("meta"), "The embedding of LlamaForCausalLM is offloaded"),
    ],
)
def test_targets_without_what_drafting_needs(harm, message):
    target = make_target()
    drafter = make_drafter(target)
    harm(target)
    with pytest.raises(ValueError, match=message):
        target.generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)


def test_ranks_that_wait_for_each_other_are_refused(target):
    with pytest.raises(ValueError, match=r"synced_gpus=True: .* pass synced_gpus=False"):
        target.generate(prompt_of(5), max_new_tokens=5, assistant_model=make_drafter(target), synced_gpus=True)


def test_stock_loop_with_a_filled_cache_is_refused(target):
    """Transformers' own loop gives other tokens there, with prompt lookup as well."""
    ids = prompt_of(9)
    first = target.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="draft_stock_loop=False"):
        target.generate(
            first.sequences,
            generation_config=config_of(STOCK),
            assistant_model=make_drafter(target),
            **cache_kwarg(cache_of(first)),
        )


def test_the_stock_loop_refuses_a_prefilled_cache(target):
    ids, filled = prompt_of(12), DynamicCache()
    target(ids[:, :8], use_cache=True, **cache_kwarg(filled))
    with pytest.raises(ValueError, match=r"draft_stock_loop=True reads the whole prompt again .* drop the cache"):
        config = config_of(STOCK)
        target.generate(ids, generation_config=config, assistant_model=make_drafter(target), **cache_kwarg(filled))
