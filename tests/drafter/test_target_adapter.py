"""The adapter's three views of a target equal the target's own results, for every family."""

import copy

import pytest
import torch
from helpers.tiny_models import COMMON, FAMILIES, make_target, randomize
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter


IDS = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64], [1, 2, 3, 4, 5, 6, 7, 127]])


def make_cohere():
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return CohereForCausalLM(config).double().eval()


@pytest.fixture(params=[*FAMILIES, "cohere"])
def family_target(request):
    target = make_cohere() if request.param == "cohere" else make_target(request.param)
    return randomize(target, scale=0.05)


def test_logits_of_features_are_the_targets_logits(family_target):
    adapter = TargetAdapter(family_target)
    with torch.no_grad():
        out = family_target(IDS, output_hidden_states=True)
        torch.testing.assert_close(adapter.logits(adapter.features(out)), out.logits, rtol=1e-12, atol=1e-12)
    adapter.check_identity()


def test_embed_is_what_the_first_layer_gets(family_target):
    seen = []
    layer = family_target.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        family_target(IDS)
        hook.remove()
        assert torch.equal(TargetAdapter(family_target).embed(IDS), seen[0])


SCALED = ("gemma", "gemma2", "gemma4_text", "vaultgemma", "minicpm3", "granite_swa", "granitemoeshared", "hyperclovax")


def test_embedding_scale_is_what_embed_multiplies_by(family_target):
    adapter = TargetAdapter(family_target)
    rows = family_target.get_input_embeddings().weight[IDS]
    with torch.no_grad():
        torch.testing.assert_close(adapter.embed(IDS), rows * adapter.embedding_scale, rtol=1e-6, atol=0)
    assert CoralDraftModel.from_target(family_target).config.target_embedding_scale == adapter.embedding_scale


@pytest.mark.parametrize("kind", SCALED)
def test_embedding_scale_without_weights(kind):
    """Families that the code does not name, on the meta device as in a conversion."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {kind}")
    config = CONFIG_MAPPING[kind](num_hidden_layers=2)
    if hasattr(config, "embedding_multiplier"):
        config.embedding_multiplier = 12.0
    with torch.device("meta"):
        adapter = TargetAdapter(AutoModelForCausalLM.from_config(config))
    expected = 12.0 if "gemma" not in kind else config.hidden_size**0.5
    assert adapter.embedding_scale == pytest.approx(expected)


def test_logits_of_some_tokens_are_columns_of_all(family_target):
    adapter = TargetAdapter(family_target)
    features = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = adapter.logits(features)
        assert full.shape == (2, 3, 128)
        some = torch.tensor([127, 0, 5, 6])
        torch.testing.assert_close(adapter.logits(features, token_ids=some), full[..., some])
        torch.testing.assert_close(adapter.logits(features, token_ids=slice(32, 64)), full[..., 32:64])


def test_compute_features_skips_the_head_and_says_the_same(family_target):
    with torch.no_grad():
        out = family_target(IDS, output_hidden_states=True)
    for layers in ([-1], [0, 1, -1]):
        adapter = TargetAdapter(family_target, layers)
        computed = adapter.compute_features(IDS)
        assert computed.shape == (2, 8, 32 * len(layers))
        torch.testing.assert_close(computed, adapter.features(out), rtol=0, atol=0)


def test_feature_layers_are_residual_streams_in_the_order_asked_for(target):
    with torch.no_grad():
        out = target(IDS, output_hidden_states=True)
    features = TargetAdapter(target, [2, 0, -1]).features(out)
    assert torch.equal(features, torch.cat([out.hidden_states[2], out.hidden_states[0], out.hidden_states[-1]], -1))
    assert torch.equal(features[..., 32:64], target.get_input_embeddings()(IDS))


def test_sizes_and_device(target):
    adapter = TargetAdapter(target)
    assert (adapter.vocab_size, adapter.hidden_size, adapter.device.type) == (128, 32, "cpu")


def test_a_biased_head():
    target = make_target("qwen2")
    target.lm_head = nn.Linear(32, 128, bias=True, dtype=torch.float64)
    adapter = TargetAdapter(target)
    with torch.no_grad():
        out = target(IDS, output_hidden_states=True)
        logits = adapter.logits(adapter.features(out))
        torch.testing.assert_close(logits, out.logits)
        some = torch.tensor([3, 90])
        torch.testing.assert_close(adapter.logits(adapter.features(out), token_ids=some), out.logits[..., some])
    assert target.lm_head.bias.abs().max() > 0


def test_logits_take_features_of_another_dtype():
    target = make_target(dtype=torch.bfloat16)
    adapter = TargetAdapter(target)
    features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert adapter.logits(features).dtype == torch.bfloat16
    assert torch.equal(adapter.logits(features), adapter.logits(features.bfloat16()))
    assert torch.equal(adapter.logits(features, token_ids=slice(0, 4)), adapter.logits(features)[..., :4])


def test_a_peft_wrapped_target():
    peft = pytest.importorskip("peft")
    plain = make_target()
    wrapped = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    ).eval()
    adapter = TargetAdapter(wrapped)
    with torch.no_grad():
        out = wrapped(IDS, output_hidden_states=True)
        torch.testing.assert_close(adapter.logits(adapter.features(out)), out.logits)
        torch.testing.assert_close(adapter.compute_features(IDS), out.hidden_states[-1])
        assert not torch.allclose(out.logits, plain(IDS).logits), "the adapters are part of the target"
    adapter.check_identity()
    drafter = CoralDraftModel.from_target(wrapped)
    assert drafter.config.target_model_type == "llama"


def test_the_adapter_refuses_what_has_no_decoder_or_head():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        TargetAdapter(t5)
    headless = AutoModel.from_config(make_target(dtype=torch.float32).config)
    with pytest.raises(ValueError, match="LlamaModel has no LM head; load it with AutoModelForCausalLM"):
        TargetAdapter(headless)


@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [("granite", "_logit_scale", 1.0), ("gemma3_text", "_softcap", None), ("llama", "_logit_scale", 1.01)],
)
def test_check_identity_catches_a_scale_the_adapter_does_not_know(family, attribute, value):
    adapter = TargetAdapter(make_target(family))
    adapter.check_identity()
    setattr(adapter, attribute, value)
    with pytest.raises(ValueError, match=r"differs by .* from the logits of .*ForCausalLM: .*Adding a target family"):
        adapter.check_identity()


def test_a_target_with_logits_of_another_kind_gets_no_drafter(target):
    """A target whose head does more than its module, and one with fewer logits than its vocabulary."""
    for harm, message in (
        (lambda x: x + 1, "differs by 1 from"),
        (lambda x: x[..., :100], r"\[1, 2, 128\], not .*100\]"),
    ):
        wrapped = copy.deepcopy(target)
        forward = wrapped.forward

        def harmed(*args, forward=forward, harm=harm, **kwargs):
            outputs = forward(*args, **kwargs)
            outputs.logits = harm(outputs.logits)
            return outputs

        wrapped.forward = harmed
        with pytest.raises(ValueError, match=f"{message}.*wrong ones"):
            CoralDraftModel.from_target(wrapped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["granite", "gemma3_text"])
def test_rounding_is_no_other_head(family, dtype):
    TargetAdapter(make_target(family, dtype=dtype)).check_identity()


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_identity_is_not_checked_where_nothing_can_run(target, attention):
    config = copy.deepcopy(target.config)
    with torch.device("meta"):
        CoralDraftModel.from_target(AutoModelForCausalLM.from_config(config), shape="eagle3")
    target.config._attn_implementation = attention  # moved to a GPU later, say
    CoralDraftModel.from_target(target)


@pytest.mark.parametrize("scaling", [0.25, 1.0])
def test_hyperclovax_multiplies_by_what_granite_divides_by(scaling):
    if "hyperclovax" not in CONFIG_MAPPING:
        pytest.skip("this Transformers has no hyperclovax")
    config = CONFIG_MAPPING["hyperclovax"](**COMMON, logits_scaling=scaling, embedding_multiplier=3.0)
    target = AutoModelForCausalLM.from_config(config).double().eval()
    TargetAdapter(target).check_identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 64}, "vocab_size=64 .*LlamaForCausalLM has 128"),
        ({"hidden_size": 64}, "hidden_size=64 .*has 32"),
        ({"target_model_type": "qwen2"}, "model_type='qwen2' .*has 'llama'"),
        ({"target_num_hidden_layers": 9}, "num_hidden_layers=9 .*has 4"),
    ],
)
def test_a_drafter_of_another_target_is_refused(settings, message, target):
    config = CoralDraftConfig.from_target(target.config, target_name_or_path="org/other")
    TargetAdapter(target).check_drafter(config)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{message}.*from_target") as error:
        TargetAdapter(target).check_drafter(config)
    assert "org/other" in str(error.value)
