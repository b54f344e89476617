"""A drafter's configuration: values from its target, refusals, and storage as JSON."""

import json
import re

import pytest
import torch
from helpers.tiny_models import FAMILIES, make_target
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, Phi3Config, PreTrainedTokenizerFast, T5Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from coral_hf import CoralDraftConfig, CoralDraftModel, demo
from coral_hf.drafter.configuration_coral import FC_NORMS, vocab_hash


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THREE = {"shape": "eagle3", "target_feature_layers": [1, 2, 3]}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_target_takes_every_dimension(family):
    target = make_target(family, dtype=torch.float32)
    text = target.config.get_text_config()
    config = CoralDraftConfig.from_target(target.config)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
        assert getattr(config, name) == getattr(text, name), name
    assert config.num_key_value_heads == text.num_key_value_heads == 2
    assert config.head_dim == (16 if family in ("qwen3", "gemma3_text") else 8)
    assert config.rms_norm_eps == text.rms_norm_eps
    assert config.hidden_act == ("gelu_pytorch_tanh" if family == "gemma3_text" else "silu")
    assert (config.target_model_type, config.target_num_hidden_layers) == (family, 4)
    assert config.target_feature_layers == [-1] and config.num_target_features == 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3_text"])
def test_plain_rope_is_the_targets(family):
    target = make_target(family, dtype=torch.float32)
    config = CoralDraftConfig.from_target(target.config)
    ours = LlamaRotaryEmbedding(config).inv_freq
    theirs = LlamaRotaryEmbedding(target.config).inv_freq
    assert torch.equal(ours, theirs)


def test_gemma3_nested_rope_takes_the_full_attention_entry():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    target = make_target("gemma3_text", dtype=torch.float32).config
    target.rope_parameters = nested
    config = CoralDraftConfig.from_target(target)
    assert config.rope_parameters == nested["full_attention"]
    # a copy: editing one config leaves the other alone
    config.rope_parameters["factor"] = 1.0
    assert target.rope_parameters["full_attention"]["factor"] == 8.0


def test_llama3_rope_scaling_is_kept():
    target = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=LLAMA3_ROPE)
    config = CoralDraftConfig.from_target(target)
    assert config.rope_parameters == LLAMA3_ROPE
    assert torch.equal(LlamaRotaryEmbedding(config).inv_freq, LlamaRotaryEmbedding(target).inv_freq)


def test_old_style_rope_scaling_is_understood():
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    target = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_theta=500000.0, rope_scaling=scaling)
    assert CoralDraftConfig.from_target(target).rope_parameters == LLAMA3_ROPE


def test_phi3_partial_rope_becomes_a_full_default_one():
    target = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
    )
    config = CoralDraftConfig.from_target(target)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}
    assert LlamaRotaryEmbedding(config).inv_freq.numel() == config.head_dim // 2


def test_overrides_win_and_unknown_keys_are_refused():
    target = LlamaConfig(hidden_size=32, num_attention_heads=4)
    assert CoralDraftConfig.from_target(target, shape="eagle", intermediate_size=48).intermediate_size == 48
    with pytest.raises(ValueError, match=r"Unknown setting\(s\) \['draft_deph'\].*draft_depth"):
        CoralDraftConfig.from_target(target, draft_deph=3)
    with pytest.raises(ValueError, match="Unknown setting"):
        CoralDraftConfig(num_layers=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "eagle2"}, "shape='eagle2' is unknown"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"draft_depth": 0}, "draft_depth=0 must be an integer of at least 1"),
        ({"draft_top_k": 0}, "draft_top_k=0 must be an integer of at least 1"),
        ({"draft_total_tokens": 1}, "draft_total_tokens=1 must be an integer of at least 2 .* or None"),
        (
            {"draft_depth": 1, "draft_total_tokens": 60},
            r"draft_total_tokens=60 .* \(2, the root included\)\. Lower it to 2",
        ),
        ({"router_groups": 8, "router_hidden_size": -1}, "router_hidden_size=-1 must be at least 1; leave it out"),
        ({"draft_calibration": [0.1] * 8}, r"draft_calibration contains 0\.1: a row is 8 numbers"),
        ({"draft_calibration": [["a"] * 8]}, "draft_calibration contains .* a row is 8 numbers"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 2}, "exactly 1 layer"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"shape": "eagle", "target_feature_layers": [1, -1]}, "Use shape='eagle3' for several"),
        ({"shape": "eagle", "norm_before_residual": True}, "norm_before_residual=True exists for shape='eagle3'"),
        ({"shape": "eagle3", "fc_bias": True}, "fc_bias=True exists for shape='eagle' only"),
        ({"norm_before_fc": True}, r"norm_before_fc=True .* shape='eagle' with .*\[-1\] .* set it to False, or"),
        ({"shape": "eagle3", "fc_norm": True}, r"fc_norm=True .* target_feature_layers=\[-1\] .* list several layers"),
        (
            {**THREE, "norm_before_fc": True, "fc_norm": True},
            "norm_before_fc=True and fc_norm=True: .* one of the two",
        ),
        ({**THREE, "fc_norm": "yes"}, "fc_norm='yes' must be of type bool"),
        ({"target_feature_layers": []}, r"target_feature_layers=\[\]"),
        ({"target_feature_layers": [-2]}, r"target_feature_layers=\[-2\]"),
        ({"target_feature_layers": [9, -1], "target_num_hidden_layers": 4}, "has 4 layers"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CoralDraftConfig(**settings)


def test_json_round_trip(tmp_path):
    target = make_target("gemma3_text", dtype=torch.float32)
    config = CoralDraftConfig.from_target(
        target.config,
        target_name_or_path="org/name",
        target_revision="abc",
        target_vocab_hash="0" * 64,
        shape="eagle3",
        target_feature_layers=[1, -1],
        draft_depth=3,
        draft_top_k=4,
    )
    config.save_pretrained(tmp_path)
    for again in (CoralDraftConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is CoralDraftConfig
        # where a config was read from is not part of it
        assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "coral"
    assert stored["target_feature_layers"] == [1, -1] and stored["draft_top_k"] == 4


def test_a_misspelt_key_in_config_json_is_refused(tmp_path):
    CoralDraftConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "draft_lenght": 5}))
    with pytest.raises(ValueError, match="draft_lenght"):
        CoralDraftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["Infinity", "null", "7", '"x"', "[1]", "{}", None])
def test_a_config_json_without_settings_is_refused(value, tmp_path):
    """Also if there is no config: Transformers would continue with the defaults, Llama-2-7B's sizes."""
    if value is not None:
        (tmp_path / "config.json").write_text(value)
    with pytest.raises(ValueError, match=r"config\.json.*save_pretrained") as caught:
        CoralDraftConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [[1, "a", None], {"a": 1}, 7, "x", "", "int8"])
@pytest.mark.parametrize("reader", [CoralDraftConfig, AutoConfig])
def test_an_odd_dtype_is_refused(key, value, reader, tmp_path):
    CoralDraftConfig(dtype="bfloat16").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("dtype") == "bfloat16"
    path.write_text(json.dumps({**settings, key: value}))
    with pytest.raises(ValueError, match=re.escape(f"dtype={str(value)!r} is not a floating-point dtype")):
        reader.from_pretrained(tmp_path)


def test_a_setting_read_from_a_file_names_it(tmp_path):
    CoralDraftConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 7}))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: head_dim=7 must be even"):
        CoralDraftConfig.from_pretrained(tmp_path)


def test_the_config_of_another_model_is_told_in_a_few_words(tmp_path):
    make_target("qwen3").config.save_pretrained(tmp_path / "other")
    for load in (CoralDraftConfig.from_pretrained, CoralDraftModel.from_pretrained):
        with pytest.raises(
            ValueError, match=r"model_type='qwen3' with setting\(s\) \[.*\] and \d+ more .*from_eagle"
        ) as error:
            load(tmp_path / "other")
        assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="model_type='llama': the config of another model"):
        CoralDraftConfig(model_type="llama")
    with pytest.raises(ValueError, match=r"\['draft_dept'\] for CoralDraftConfig. Did you mean 'draft_depth'\?"):
        CoralDraftConfig(draft_dept=3)
    with pytest.raises(ValueError, match=r"\['xx0', 'xx1', 'xx2'\] and 1 more .*documentation"):
        CoralDraftConfig(**{f"xx{index}": 0 for index in range(4)})


def test_encoder_decoders_and_models_without_dimensions_are_refused():
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
        CoralDraftConfig.from_target(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    config = AutoConfig.for_model("resnet")
    with pytest.raises(ValueError, match=r"has no \[.*\] in its config, .* choose a target of Llama's layout"):
        CoralDraftConfig.from_target(config)


@pytest.mark.parametrize(
    ("kind", "head_dim", "width"),
    [("gemma4_text", 512, 9216), ("gemma4", 512, 9216), ("gemma3n_text", 256, 16384), ("gemma3n", 256, 16384)],
)
def test_sizes_that_differ_from_layer_to_layer(kind, head_dim, width):
    """The drafter's are those of the last full-attention layer."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {kind}")
    config = CoralDraftConfig.from_target(CONFIG_MAPPING[kind]())
    assert (config.head_dim, config.intermediate_size) == (head_dim, width)


def word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


def test_vocab_hash_is_stable_and_sensitive():
    first = vocab_hash(word_tokenizer({"a": 0, "b": 1, "ü": 2}))
    assert first == vocab_hash(word_tokenizer({"ü": 2, "b": 1, "a": 0}))  # insertion order does not matter
    # SHA-256 of '[["a", 0], ["b", 1], ["\\u00fc", 2]]': drafters already published must keep their hash
    assert first == "f8f0fa485c483baac298b91aafc117c322af66a8ff104b2ed22da0647a3e2b54"
    assert first != vocab_hash(word_tokenizer({"a": 0, "b": 2, "ü": 1}))
    assert first != vocab_hash(word_tokenizer({"a": 0, "b": 1, "u": 2}))
    assert first != vocab_hash(word_tokenizer({"a": 0, "b": 1, "ü": 2, "c": 3}))


def test_an_embedding_scale_that_is_not_recorded_is_not_written(tmp_path):
    """The config.json of drafters from before the setting is unchanged, and so is that of later ones."""
    stored = json.loads((demo.drafter_path() / "config.json").read_text())
    older = {name: value for name, value in stored.items() if name != "target_embedding_scale"}
    assert "target_embedding_scale" not in CoralDraftConfig().to_dict() and older != stored
    for settings in (older, stored):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        again = json.loads(CoralDraftConfig.from_pretrained(tmp_path).to_json_string())
        assert {**again, "transformers_version": None} == {**settings, "transformers_version": None}
    scaled = CoralDraftConfig(target_embedding_scale=48.0)
    assert CoralDraftConfig(**json.loads(scaled.to_json_string())).target_embedding_scale == 48.0
    with pytest.raises(ValueError, match=r"target_embedding_scale=0\.0 must be positive"):
        CoralDraftConfig(target_embedding_scale=0.0)


@pytest.mark.parametrize("setting", FC_NORMS)
def test_a_norm_before_fc_is_written_where_it_is(setting, tmp_path):
    """Configs without one are unchanged, and earlier releases load them."""
    assert set(FC_NORMS) == {"norm_before_fc", "fc_norm"} and not set(FC_NORMS) & set(
        CoralDraftConfig(**THREE).to_dict()
    )
    CoralDraftConfig(**THREE, **{setting: True}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {name: stored[name] for name in FC_NORMS if name in stored} == {setting: True}
    loaded = CoralDraftConfig.from_pretrained(tmp_path)
    assert [getattr(loaded, name) for name in FC_NORMS] == [name == setting for name in FC_NORMS]
    plain = CoralDraftConfig.from_pretrained(demo.drafter_path())
    assert not plain.norm_before_fc and not plain.fc_norm


def test_the_commit_of_a_target_from_the_hub_is_recorded():
    target = make_target(dtype=torch.float32).config
    assert CoralDraftConfig.from_target(target).target_revision is None
    target._commit_hash = "0" * 40
    assert CoralDraftConfig.from_target(target).target_revision == "0" * 40
