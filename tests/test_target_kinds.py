"""Targets beyond plain text decoders: multimodal, chunked, convolutional and recurrent ones, and every refusal's cost."""

import pytest
import torch
from conftest import COMMON, make_drafter, make_target
from oracle import oracle
from test_lossless import CHAIN, STOCK, TREES, config_of, prompt_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MIXED = ["sliding_attention", "full_attention"] * 2
MULTIMODAL = {
    "gemma3": {
        "text_config": {
            **COMMON,
            "model_type": "gemma3_text",
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": MIXED,
            "query_pre_attn_scalar": 16,
        },
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 120,
        "boi_token_index": 121,
        "eoi_token_index": 122,
    },
    "llava": {
        "text_config": {**COMMON, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 120,
    },
}
# layers whose state no tree can branch from, but which the stock loop verifies chains on
CHAINS_ONLY = {
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
RECURRENT = {
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "recurrent_gemma": {},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}


def build(auto_class, family: str, settings: dict):
    torch.manual_seed(0)
    model = auto_class.from_config(CONFIG_MAPPING[family](**settings), attn_implementation="sdpa").double().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def assert_lossless(target, drafter, ids, size, **inputs):
    plain = target.generate(ids, generation_config=config_of({}), **inputs)
    drafted = target.generate(ids, generation_config=config_of(size), assistant_model=drafter, **inputs)
    assert torch.equal(drafted, plain), "random drafts"
    with oracle(plain, 0.85):
        drafted = target.generate(ids, generation_config=config_of(size), assistant_model=drafter, **inputs)
    assert torch.equal(drafted, plain), "oracle drafts"
    assert drafter.last_stats.acceptance_length > 1.5


@pytest.mark.parametrize("size", [CHAIN, TREES["tree16"], STOCK], ids=["chain", "tree", "stock"])
@pytest.mark.parametrize("family", list(MULTIMODAL))
def test_multimodal_targets_generate_text(family, size):
    target = build(AutoModelForImageTextToText, family, MULTIMODAL[family])
    drafter = make_drafter(target)
    for length in (6, 24):
        assert_lossless(target, drafter, prompt_of(length), size)


@pytest.mark.parametrize("size", [CHAIN, TREES["tree16"]], ids=["chain", "tree"])
def test_an_image_in_the_prompt(size):
    """The image enters with the prefill; drafted tokens are text."""
    target = build(AutoModelForImageTextToText, "llava", MULTIMODAL["llava"])
    ids = prompt_of(12)
    ids[ids == 120] = 7
    ids[0, 3:7] = 120  # (28 / 14)^2 patches
    torch.manual_seed(3)
    pixels = torch.randn(1, 3, 28, 28, dtype=torch.float64)
    blind = target.generate(ids, generation_config=config_of({}), pixel_values=torch.zeros_like(pixels))
    assert not torch.equal(blind, target.generate(ids, generation_config=config_of({}), pixel_values=pixels))
    assert_lossless(target, make_drafter(target), ids, size, pixel_values=pixels)


@pytest.mark.parametrize("family", list(CHAINS_ONLY))
def test_layers_that_cannot_branch(family):
    target = build(AutoModelForCausalLM, family, {**COMMON, **CHAINS_ONLY[family]})
    drafter = make_drafter(target)
    for size in (CHAIN, TREES["tree16"]):
        assert_refused(target, drafter, prompt_of(9), size, r"draft_top_k=1 and draft_stock_loop=True")
    for length in (9, 30):  # within the attention chunk of 16 and past it
        assert_lossless(target, drafter, prompt_of(length), STOCK)


@pytest.mark.parametrize("size", [CHAIN, TREES["tree16"], STOCK], ids=["chain", "tree", "stock"])
@pytest.mark.parametrize("family", list(RECURRENT))
def test_recurrent_targets_are_refused(family, size):
    target = build(AutoModelForCausalLM, family, {**COMMON, **RECURRENT[family]})
    assert_refused(target, make_drafter(target), prompt_of(9), size, "stateful models")


def assert_refused(target, drafter, ids, size, message, **inputs):
    """Refused with that message, before any forward, and nothing is left behind."""
    forwards = []
    handle = target.register_forward_pre_hook(lambda *args: forwards.append(args))
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in target.named_modules()}
    attention, stats = target.config.get_text_config()._attn_implementation, drafter.last_stats
    with pytest.raises(ValueError, match=message):
        config = inputs.pop("generation_config", None) or config_of(size)
        target.generate(ids, generation_config=config, assistant_model=drafter, **inputs)
    assert not forwards
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in target.named_modules()}
    assert target.config.get_text_config()._attn_implementation == attention and drafter.last_stats is stats
    handle.remove()


def test_every_refusal_comes_before_a_forward(target):
    drafter, ids, tree = make_drafter(target), prompt_of(9), TREES["tree16"]
    assert_refused(target, drafter, ids.expand(2, -1), tree, "batch of 2")
    assert_refused(target, drafter, ids, tree, "use_cache=True", use_cache=False)
    assert_refused(target, drafter, ids, tree, "num_beams", generation_config=config_of(tree, num_beams=2))
    static = config_of(tree, cache_implementation="static")
    assert_refused(target, drafter, ids, tree, "cache_implementation", generation_config=static)
    assert_refused(target, drafter, ids, {**tree, "draft_top_k": 0}, "draft_top_k=0")
    assert_refused(target, drafter, ids, tree, "synced_gpus=True", synced_gpus=True)
    other = make_drafter(make_target("qwen2"))
    assert_refused(target, other, ids, tree, "model_type")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_tree_masks(target, attention, monkeypatch):
    drafter = make_drafter(target)
    monkeypatch.setattr(target.config, "_attn_implementation_internal", attention)
    assert_refused(target, drafter, prompt_of(9), TREES["tree16"], r"attn_implementation='sdpa'")
