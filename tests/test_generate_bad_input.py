"""Targets and caches that a drafter cannot be used with: a `ValueError` that names the value (calls: `test_target_kinds.py`)."""

import pytest
import torch
from conftest import make_drafter, make_target
from parity import STOCK, TREES, compare, config_of, prompt_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaConfig

from coral_hf.compat import cache_kwarg, cache_of


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


@pytest.mark.parametrize("tree", ["chain", "tree16"])
def test_a_target_that_fills_no_cache_is_refused(tree):
    config = CONFIG_MAPPING["openai-gpt"](vocab_size=128, n_embd=32, n_layer=4, n_head=4, n_positions=512)
    target = AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.use_cache = True
    with pytest.raises(ValueError, match="After 9 tokens the KV cache of OpenAIGPTLMHeadModel holds 0"):
        target.generate(prompt_of(9), generation_config=config_of(TREES[tree]), assistant_model=make_drafter(target))


@pytest.mark.parametrize("tree", ["chain", "tree16"])
def test_an_active_alora_is_refused(target, tree):
    """It is applied from its invocation tokens on, which PEFT counts from the end of each forward."""
    peft = pytest.importorskip("peft")
    drafter, ids = make_drafter(target), prompt_of(9)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    invoked = peft.LoraConfig(**settings, alora_invocation_tokens=ids[0, 4:6].tolist())
    wrapped = peft.get_peft_model(target, invoked, adapter_name="invoked").double().eval()
    wrapped.add_adapter("ordinary", peft.LoraConfig(**settings))
    wrapped.double()
    with pytest.raises(ValueError, match=r"adapter 'invoked' is an aLoRA .*without assistant_model"):
        wrapped.generate(input_ids=ids, generation_config=config_of(TREES[tree]), assistant_model=drafter)
    with wrapped.disable_adapter():
        compare(wrapped, drafter, ids, TREES[tree])
    wrapped.set_adapter("ordinary")
    compare(wrapped, drafter, ids, TREES[tree])


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
