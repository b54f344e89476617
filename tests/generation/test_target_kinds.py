"""Targets beyond plain text decoders: images, chunked and convolutional layers; and refusals that change nothing."""

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, STOCK, TREES, assert_refused, compare, config_of, phi3_restarts, prompt_of
from helpers.tiny_models import make_drafter, make_target
from helpers.unusual_targets import (
    CHAINS_ONLY,
    GEMMA_3N,
    PER_LAYER,
    POSITIONLESS,
    build,
    build_positionless,
    cross_attending_target,
    image_target,
    needs,
)
from transformers import AutoModelForCausalLM, DynamicCache

from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.utils.compat import cache_kwarg


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
def test_image_targets(kind, attention):
    """With and without an image in the prefill; Qwen2-VL's image spans fewer positions than tokens."""
    target, ids, inputs = image_target(kind, attention)
    drafter = make_drafter(target)
    texts = []
    for prompt, extra in ((ids, inputs), (ids.masked_fill(ids > 120, 9), {})):
        plain = target.generate(input_ids=prompt, generation_config=config_of({}), **extra)
        texts.append(plain[:, ids.shape[1] :])
        for size in (CHAIN, STOCK, TREES["tree16"]):
            config = config_of(size)
            drafted = target.generate(input_ids=prompt, generation_config=config, assistant_model=drafter, **extra)
            assert torch.equal(plain, drafted)
            with oracle(plain):
                drafted = target.generate(input_ids=prompt, generation_config=config, assistant_model=drafter, **extra)
            assert torch.equal(plain, drafted) and drafter.last_stats.n_accepted > drafter.last_stats.steps
    assert not torch.equal(*texts), "the image changes nothing"
    assert texts[0].unique().numel() > 3


def test_an_image_is_not_split_into_chunks():
    target, ids, inputs = image_target("llava", "sdpa")
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match=r"prefill_chunk_size=8 .* not (pixel_values|mm_encoder)"):
        target.generate(
            ids, generation_config=config_of(CHAIN, prefill_chunk_size=8), assistant_model=drafter, **inputs
        )
    config = config_of(CHAIN, prefill_chunk_size=ids.shape[1])
    drafted = target.generate(ids, generation_config=config, assistant_model=drafter, **inputs)
    assert torch.equal(drafted, target.generate(ids, generation_config=config_of({}), **inputs))


@phi3_restarts
@pytest.mark.parametrize("length", [20, 33, 40])
def test_prompts_that_phi3_reads_without_its_cache(length):
    """Beyond the range of its short RoPE factors, it drops a given cache, filled or not, and starts a new one."""
    target = build("phi3", {"original_max_position_embeddings": 32}, "sdpa")
    drafter, ids = make_drafter(target), prompt_of(length)
    for size in (CHAIN, TREES["tree16"], STOCK):
        plain, stats = compare(target, drafter, ids, size)
        assert stats.n_accepted / stats.steps >= 1.5
        if size is not STOCK:
            filled = DynamicCache(config=target.config)
            target(input_ids=ids[:, :9], use_cache=True, **cache_kwarg(filled))
            with oracle(plain):
                config = config_of(size)
                drafted = target.generate(
                    ids, generation_config=config, assistant_model=drafter, **cache_kwarg(filled)
                )
            assert torch.equal(plain, drafted) and drafter.last_stats.n_accepted > drafter.last_stats.steps


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(CHAINS_ONLY))
def test_chains_only(family, attention):
    """Prompts below and beyond the attention chunk of 16, which 40 new tokens cross several times."""
    target = build(family, CHAINS_ONLY[family], attention)
    drafter = make_drafter(target)
    for length in (6, 14, 30):
        for size in (CHAIN, STOCK):
            plain, stats = compare(target, drafter, prompt_of(length), size)
            assert stats.n_accepted > stats.steps and plain[0, length:].unique().numel() > 3
    assert_refused(target, drafter, TREES["tree16"], "draft_top_k=1")


@pytest.mark.parametrize("family", list(POSITIONLESS))
def test_targets_that_take_no_tree(family):
    """Their chains equal plain generate; trees would silently give GPT-Neo, MPT and BLOOM a wrong text."""
    target = build_positionless(family)
    drafter, ids = make_drafter(target), prompt_of(20)
    plain, stats = compare(target, drafter, ids, CHAIN, use_cache=True)
    assert stats.n_accepted > stats.steps and plain[0, 20:].unique().numel() > 1
    assert_refused(target, drafter, TREES["tree16"], f"{type(target).__name__} .*draft_top_k=1", use_cache=True)


def test_windows_that_are_global_take_trees():
    """GPT-Neo without local layers, Falcon without ALiBi."""
    for family, settings in (("gpt_neo", {"attention_types": [[["global"], 4]]}), ("falcon", {"alibi": False})):
        target = build_positionless(family, **settings)
        forward = target.forward
        target.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)  # whoever wraps it
        _, stats = compare(target, make_drafter(target), prompt_of(20), TREES["tree16"], use_cache=True)
        assert stats.n_accepted > stats.steps


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("shared", [0, 2])
def test_gemma_4(shared, attention):
    """Sizes that differ from layer to layer, with and without layers that share keys."""
    needs("gemma4_text")
    settings = {**PER_LAYER, "global_head_dim": 32, "num_kv_shared_layers": shared}
    target = build("gemma4_text", settings, attention)
    drafter = make_drafter(target)
    assert drafter.config.head_dim == 32
    for size in (CHAIN, STOCK, TREES["tree16"]):
        _, stats = compare(target, drafter, prompt_of(20), size)
        assert stats.n_accepted > stats.steps


def test_gemma_3n_is_refused():
    needs("gemma3n_text")
    target = build("gemma3n_text", {**PER_LAYER, **GEMMA_3N})
    message = r"Gemma3nForCausalLM carries several hidden states for each token \(AltUp\).* choose another"
    with pytest.raises(ValueError, match=message):
        CoralDraftModel.from_target(target)
    drafter = CoralDraftModel(CoralDraftConfig.from_target(target.config)).double()
    assert_refused(target, drafter, CHAIN, message)


@pytest.fixture(scope="module")
def cross_attending():
    return cross_attending_target()


@pytest.mark.parametrize("size", [CHAIN, STOCK, TREES["tree16"]], ids=["chain", "stock", "tree"])
def test_images_behind_cross_attention_are_refused(cross_attending, size):
    """Given, or in the cache; the text of a prompt without an image equals plain generate's."""
    target, ids, image = cross_attending
    drafter = make_drafter(target)
    _, stats = compare(target, drafter, ids, size)
    assert stats.n_accepted > stats.steps
    config = config_of(size)
    with pytest.raises(ValueError, match=r"cross_attention_mask.* by cross-attention.*without assistant_model"):
        target.generate(ids, generation_config=config, assistant_model=drafter, **image)
    cache = DynamicCache(config=target.config)
    target(ids, use_cache=True, **image, **cache_kwarg(cache))
    longer = torch.cat([ids, prompt_of(3)], dim=1)
    assert_refused(target, drafter, size, "an image in the cache", longer, cache)


@pytest.mark.parametrize("size", [CHAIN, STOCK, TREES["tree16"]], ids=["chain", "stock", "tree"])
def test_encoders_behind_cross_attention_are_refused(size):
    target = build("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "add_cross_attention": True}, "sdpa")
    drafter, states = make_drafter(target), torch.randn(1, 5, 32).double()
    with pytest.raises(ValueError, match="encoder_hidden_states by cross-attention"):
        config = config_of(size)
        target.generate(prompt_of(9), generation_config=config, assistant_model=drafter, encoder_hidden_states=states)


@pytest.mark.parametrize("tree", [CHAIN, TREES["tree16"]], ids=["chain", "tree16"])
def test_a_target_spread_by_device_map(tree, tmp_path):
    """Accelerate's hooks load offloaded layers for every forward; the drafter is not offloaded."""
    whole = make_target()
    whole.save_pretrained(tmp_path)
    places = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded", dtype=torch.float64
    )
    assert target.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    ids = prompt_of(9)
    plain, stats = compare(target, make_drafter(whole), ids, tree, max_new_tokens=20)
    assert torch.equal(plain, whole.generate(ids, max_new_tokens=20))
    assert stats.acceptance_length > 1.3
