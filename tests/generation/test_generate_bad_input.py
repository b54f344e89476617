"""Targets, caches and calls that a drafter cannot be used with: a `ValueError` that names the value."""

from pathlib import Path

import pytest
import torch
from helpers.parity import CHAIN, STOCK, TREES, assert_refused, compare, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaConfig

from coral_hf import CoralDraftModel, coral_generate
from coral_hf.drafter.configuration_coral import check_vocabulary
from coral_hf.generation import hook
from coral_hf.utils.compat import cache_kwarg, cache_of, default_generation_settings


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
    with pytest.raises(ValueError, match="After 9 tokens, the KV cache of OpenAIGPTLMHeadModel contains 0"):
        target.generate(prompt_of(9), generation_config=config_of(TREES[tree]), assistant_model=make_drafter(target))


@pytest.mark.parametrize("tree", ["chain", "tree16"])
def test_an_active_alora_is_refused(target, tree):
    """It applies from its invocation tokens on, which PEFT counts from the end of each forward."""
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


def test_a_tokenizer_of_another_vocabulary_is_refused(target, monkeypatch):
    """Given for stop strings; its vocabulary is hashed once, and again when it has grown."""
    tokenizer = make_tokenizer()
    drafter = CoralDraftModel.from_target(target, tokenizer).double()
    hashed = []
    monkeypatch.setattr(hook, "check_vocabulary", lambda *args: hashed.append(1) or check_vocabulary(*args))
    call = {"max_new_tokens": 5, "assistant_model": drafter, "tokenizer": tokenizer, "stop_strings": ["zz"]}
    for _ in range(3):
        target.generate(prompt_of(5), **call)
    assert len(hashed) == 1
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"vocabulary hash .* is not the drafter's"):
        target.generate(prompt_of(5), **call)


def test_a_drafter_in_parts_is_refused(target):
    drafter = make_drafter(target)
    drafter.norm.to("meta")
    with pytest.raises(ValueError, match=r"Weights of the drafter are offloaded .* without device_map"):
        target.generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min")
def test_a_head_without_a_weight_is_refused():
    """A head of dynamic quantisation; quantised layers below the head are accepted."""
    target = make_target("qwen2", dtype=torch.float32)
    drafter, ids = make_drafter(target), prompt_of(5)
    linear = {torch.nn.Linear}
    target.model = torch.ao.quantization.quantize_dynamic(target.model, linear, dtype=torch.qint8)
    target.generate(ids, max_new_tokens=5, assistant_model=drafter)
    assert drafter.last_stats.steps > 0
    whole = torch.ao.quantization.quantize_dynamic(target, linear, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"LM head of target Qwen2ForCausalLM .* leave lm_head out"):
        whole.generate(ids, max_new_tokens=5, assistant_model=drafter)


def test_ranks_that_wait_for_each_other_are_refused(target):
    with pytest.raises(ValueError, match=r"synced_gpus=True: .* pass synced_gpus=False"):
        target.generate(prompt_of(5), max_new_tokens=5, assistant_model=make_drafter(target), synced_gpus=True)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_assistant_tokens", 2, "draft_depth"),
        ("num_assistant_tokens_schedule", "heuristic", "draft_cost_aware"),
        ("assistant_confidence_threshold", 0.9, "draft_cost_aware"),
        ("prompt_lookup_num_tokens", 4, "drop it"),
        ("max_matching_ngram_size", 3, "drop it"),
        ("assistant_early_exit", 2, "drop it"),
        ("speculation_type", "dflash", "drop it"),
        ("dola_layers", "high", "drop it"),
    ],
)
def test_settings_of_other_assistants_are_refused(target, name, value, remedy, stock):
    drafter = make_drafter(target)
    config = config_of(STOCK if stock else {}, max_new_tokens=5, **{name: value})
    with pytest.raises(ValueError, match=rf"{name}={value!r} has no effect with a CORAL drafter: .*{remedy}"):
        target.generate(prompt_of(5), generation_config=config, assistant_model=drafter)
    setattr(target.generation_config, name, value)
    with pytest.raises(ValueError, match=rf"target\.generation_config\.{name} = None"):
        target.generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)


def test_defaults_of_other_assistants_are_not_refused(target):
    """Values that `generate` fills in, and that some generation configs contain."""
    drafter, filled_in = make_drafter(target), default_generation_settings()
    names = set(hook._WITHOUT_EFFECT) & set(filled_in)
    assert {"num_assistant_tokens", "assistant_confidence_threshold"} <= names
    for name in names:
        setattr(target.generation_config, name, filled_in[name])
    target.generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)


@pytest.mark.parametrize("drafter", [None, "ordinary", "folder", Path("folder")])
def test_what_is_no_loaded_drafter_is_refused(target, drafter):
    message = r"assistant_model='folder' is the name .* AutoModel\.from_pretrained\('folder'\)"
    if isinstance(drafter, str | Path) and drafter != "ordinary":
        with pytest.raises(ValueError, match=message):
            target.generate(prompt_of(5), max_new_tokens=5, assistant_model=drafter)
    else:
        drafter = drafter and make_target()
        message = f"was given {type(drafter).__name__}: load one with AutoModel"
    with pytest.raises(ValueError, match=message):
        coral_generate(target, drafter, input_ids=prompt_of(5), max_new_tokens=5, draft_depth=3)


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


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_without_tree_masks_is_refused(target, attention):
    """FlashAttention is replaced while trees are verified, unless it caps the scores."""
    target.config._attn_implementation = attention  # set on the config: the kernels need not be installed
    target.config.attn_logit_softcapping = 30.0
    assert_refused(target, make_drafter(target), TREES["tree16"], "sdpa.*draft_top_k=1")


REFUSALS = {
    "batch, stock": (STOCK, {"ids": torch.full((2, 5), 7)}, "a batch of 2"),
    "beams": ({}, {"num_beams": 2}, "num_beams"),
    "depth": ({"draft_depth": 0}, {}, "draft_depth=0"),
    "negative": ({"draft_top_k": -1}, {}, "draft_top_k=-1"),
    "total": ({"draft_depth": 2, "draft_top_k": 2, "draft_total_tokens": 60}, {}, "draft_total_tokens=60"),
    "unknown": ({"draft_width": 3}, {}, "draft_width"),
    "cost-aware": ({"draft_cost_aware": "yes"}, {}, "draft_cost_aware='yes'"),
    "lookup": ({"draft_lookup": 1}, {}, "draft_lookup=1 must be True or False"),
    "compiled lookup": ({"draft_compile": True, "draft_lookup": True}, {}, "Set one of them to False"),
    "stock lookup": ({"draft_stock_loop": True, "draft_lookup": True}, {}, "Set one of them to False"),
    "compiled list": ({"draft_compile": True, "draft_head": "context"}, {}, "or choose another draft_head"),
    "stock tree": ({"draft_stock_loop": True, "draft_top_k": 2}, {}, "draft_top_k=1"),
    "stock stop strings": (STOCK, {"stop_strings": ["ab"]}, "stop_strings|tokenizer"),
    "static cache, stock": (STOCK, {"cache_implementation": "static"}, "[Ss]tatic"),
    "no cache": ({}, {"use_cache": False}, "use_cache=True"),
    "attentions": ({}, {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "attentions, cost-aware": (
        {"draft_cost_aware": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        "output_attentions",
    ),
    "no router": ({"draft_head": "router"}, {}, "no router"),
    "no low-rank head": ({"draft_head": "low_rank"}, {}, "has no low-rank head; add one with"),
    "no router, cost-aware": ({"draft_head": "router", "draft_cost_aware": True}, {}, "no router"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals_come_first_and_leave_no_trace(target, case, tmp_path, monkeypatch):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path))  # no costs are known: measuring them would run forwards
    size, settings, message = REFUSALS[case]
    assert_refused(target, make_drafter(target), size, message, **settings)


MASKS = {
    "left and right": ([[0, 1, 1, 1], [1, 1, 1, 0]], "Prompt 1 of the batch has padding, .* Pad on the left"),
    "both sides": ([[1, 1, 1, 1], [0, 1, 1, 0]], "Prompt 1 of the batch has padding"),
    "a hole": ([[1, 0, 1, 1], [0, 1, 1, 1]], "Prompt 0 of the batch has padding, or a hole"),
    "one empty": ([[0, 1, 1, 1], [0, 0, 0, 0]], "Prompt 1 of the batch is empty"),
    "all empty": ([[0, 0, 0, 0], [0, 0, 0, 0]], "Prompt 0 of the batch is empty"),
}


@pytest.mark.parametrize("case", list(MASKS))
def test_batches_that_are_not_padded_on_the_left_alone(target, case):
    mask, message = MASKS[case]
    batch = {"ids": torch.full((2, 4), 7), "mask": torch.tensor(mask)}
    assert_refused(target, make_drafter(target), CHAIN, message, **batch)


def test_a_batch_without_any_token(target):
    with pytest.raises(ValueError, match="input_ids is empty"):
        target.generate(torch.zeros(2, 0, dtype=torch.long), max_new_tokens=4, assistant_model=make_drafter(target))


def test_a_drafter_of_another_target_is_refused_first(target):
    assert_refused(make_target("qwen2"), make_drafter(target), CHAIN, "model_type")
