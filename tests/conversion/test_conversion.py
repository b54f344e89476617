"""Loaded EAGLE-1/2, HASS and EAGLE-3 checkpoints give the published forward's logits, from every layout."""

import pytest
import torch
from helpers.eagle_checkpoints import (
    HEAD_DIM,
    HIDDEN,
    LLAMA,
    VOCAB,
    eagle1_tensors,
    eagle3_tensors,
    noise,
    reference_logits,
    write,
)
from helpers.tiny_models import make_target

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.drafter.draft_layer import DraftKeyValues
from coral_hf.generation.settings import DraftSettings


LAYOUTS = ["safetensors", "bin", "sharded safetensors", "sharded bin"]
DRAFT_IDS = torch.tensor([3, 5, 6, 20, 21, 40, 77, 90, 100, 127])


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


def drafted_logits(drafter, target, ids, steps=3):
    """The equivalent of `reference_logits` from the drafter's own draft steps and head, and the features used."""
    adapter = TargetAdapter(target, drafter.config.target_feature_layers)
    head = DraftSettings(draft_depth=steps).draft_head_of(drafter, adapter)
    with torch.no_grad():
        features = adapter.compute_features(ids[None])[:, :-1]
        cache = DraftKeyValues(drafter.config, 64, drafter.dtype, "cpu")
        feature, tokens, slot, result = drafter.project_features(features), ids[None, 1:], 0, []
        for _ in range(steps):
            positions = torch.arange(slot, slot + tokens.shape[1])[None]
            hidden, fed_back = drafter.draft(adapter.embed(tokens), feature, positions, cache, slot)
            logits, groups, _ = head._active_logits(hidden[:, -1:], None)
            scored = head._token_ids(torch.arange(logits.shape[-1])[None, None], groups)[0, 0]
            result.append((logits[0, 0], scored))
            slot += tokens.shape[1]
            tokens, feature = scored[logits[0, 0].argmax()].view(1, 1), fed_back[:, -1:]
    return result, features[0]


def assert_same_logits(drafter, tensors, target, **flags):
    ids = torch.tensor([5, 9, 3, 77, 31, 8])
    found, features = drafted_logits(drafter, target, ids)
    expected = reference_logits(tensors, target, ids.tolist(), features, **flags)
    for (logits, scored), (reference, ids) in zip(found, expected, strict=True):
        assert torch.equal(scored, ids)
        # float32's error grows with the row's largest logit, which the un-normed residual of EAGLE-1 makes large
        size = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(logits.double(), reference, rtol=0, atol=1e-5 * size)


def assert_generates(drafter, target):
    prompt = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    for top_k in (1, 2):
        drafter.config.draft_top_k = top_k
        assert torch.equal(plain, target.generate(prompt, assistant_model=drafter, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fc_bias", [False, True])
def test_eagle1(layout, fc_bias, target, tmp_path):
    tensors = eagle1_tensors(fc_bias)
    write(tmp_path / "eagle", {**LLAMA, "architectures": ["LlamaForCausalLM"]}, tensors, layout)
    drafter = CoralDraftModel.from_eagle(tmp_path / "eagle", target)
    assert drafter.config.shape == "eagle" and drafter.config.fc_bias == fc_bias and drafter.dtype == torch.float32
    assert drafter.config.target_num_hidden_layers == 4 and drafter.config.target_model_type == "llama"
    assert_same_logits(drafter, tensors, target)
    assert_generates(drafter, target)


@pytest.mark.parametrize(
    ("keys", "theta", "factor"),
    [
        ({}, 10000.0, 1.0),
        ({"rope_theta": 500.0}, 500.0, 1.0),
        ({"rope_theta": 500, "rope_scaling": None}, 500.0, 1.0),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 500.0, 2.0),
        ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 500.0, 2.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0, 1.0),
        (
            {
                "rope_theta": 500.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            },
            500.0,
            2.0,
        ),
    ],
)
def test_rope_keys(keys, theta, factor, target, tmp_path):
    tensors = eagle1_tensors()
    write(tmp_path / "eagle", {**LLAMA, **keys}, tensors)
    drafter = CoralDraftModel.from_eagle(tmp_path / "eagle", target)
    assert_same_logits(drafter, tensors, target, theta=theta, factor=factor)


def test_eagle1_extras(target, tmp_path):
    """Copies of embedding and head, a saved RoPE buffer, q/k/v biases and a `model.` prefix change nothing."""
    tensors = eagle1_tensors(biases=True)
    stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD_DIM // 2)
    stored["model.embed_tokens.weight"] = target.get_input_embeddings().weight.detach().bfloat16()
    stored["lm_head.weight"] = target.get_output_embeddings().weight.detach()
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "qkv_bias": True, "bias": False}
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "eagle", config, stored), target)
    assert drafter.config.attention_bias and drafter.config.draft_vocab_size is None
    assert not any("embed" in name or "head" in name for name in drafter.state_dict())
    assert_same_logits(drafter, tensors, target)


def test_half_precision_stays(target, tmp_path):
    """Weights are loaded bit for bit, in the checkpoint's dtype."""
    tensors = {name: tensor.half() for name, tensor in eagle1_tensors().items()}
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "eagle", LLAMA, tensors, "bin"), target)
    assert drafter.dtype == torch.float16
    assert all(torch.equal(drafter.state_dict()[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["midlayer", "layers.0"])
@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["target's head", "reduced vocabulary"])
def test_eagle3(layout, prefix, draft_ids, target, tmp_path):
    tensors = eagle3_tensors(prefix, draft_ids=draft_ids)
    config = {**LLAMA, "architectures": ["LlamaForCausalLM"]}
    if draft_ids is not None:
        config["draft_vocab_size"] = len(draft_ids)
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "eagle3", config, tensors, layout), target)
    assert drafter.config.shape == "eagle3" and drafter.config.target_feature_layers == [2, 2, 1]
    assert drafter.config.draft_vocab_size == (None if draft_ids is None else len(draft_ids))
    assert not drafter.config.norm_output and not drafter.config.norm_before_residual
    assert_same_logits(drafter, tensors, target)
    if layout == "safetensors":
        assert_generates(drafter, target)


@pytest.mark.parametrize(
    ("keys", "features", "layers", "flags"),
    [
        # top level: the streams before the layers; under eagle_config: the layers' outputs
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, 3, [0, 1, 3], {}),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, 3, [1, 2, 3], {}),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2]}}, 2, [1, 3], {}),
        ({"eagle_config": {"use_aux_hidden_state": False}}, 1, [-1], {}),
        ({"norm_output": True}, 3, [2, 2, 1], {"norm_output": True}),
        ({"norm_before_residual": True}, 3, [2, 2, 1], {"norm_before_residual": True}),
    ],
)
def test_eagle3_features_and_norms(keys, features, layers, flags, target, tmp_path):
    tensors = eagle3_tensors("layers.0", features)
    config = {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"], **keys}
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "eagle3", config, tensors), target)
    assert drafter.config.target_feature_layers == layers
    assert_same_logits(drafter, tensors, target, **flags)


@pytest.mark.parametrize("prefix", ["midlayer", "layers.0"])
@pytest.mark.parametrize(
    ("keys", "norm"),
    [
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ({"norm_before_fc": False, "eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ({"norm_before_fc": True, "eagle_config": {"norm_before_fc": False}}, None),
        ({"fc_norm": True}, "fc_norm"),
        ({"eagle_config": {"fc_norm": True}, "norm_before_fc": False}, "fc_norm"),
        ({"fc_norm": None, "use_aux_norm": True}, "fc_norm"),
        ({"fc_norm": False, "use_aux_norm": False}, None),
    ],
)
def test_eagle3_norms_before_fc(keys, norm, prefix, target, tmp_path):
    """As in vLLM and SGLang, `eagle_config` takes precedence over the top level."""
    tensors = eagle3_tensors(prefix, norm=norm)
    config = {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"], "norm_output": True, **keys}
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "eagle3", config, tensors), target)
    assert drafter.config.norm_before_fc == (norm == "norm_before_fc") and drafter.config.fc_norm == (
        norm == "fc_norm"
    )
    assert_same_logits(drafter, tensors, target, norm_output=True)
    drafter.save_pretrained(tmp_path / "coral")
    again = CoralDraftModel.from_pretrained(tmp_path / "coral").eval()
    assert_same_logits(again, tensors, target, norm_output=True)
    assert_generates(again, target)


def test_older_names_of_the_norms_before_fc(target, tmp_path):
    tensors = eagle3_tensors(norm="fc_norm")
    names = {f"fc_norm.{i}.weight": f"aux_norm_{name}.weight" for i, name in enumerate(("low", "mid", "high"))}
    stored = {names.get(name, name): tensor for name, tensor in tensors.items()}
    path = write(tmp_path / "eagle3", {**LLAMA, "use_aux_norm": True}, stored)
    assert_same_logits(CoralDraftModel.from_eagle(path, target), tensors, target)


def test_a_setting_may_say_what_a_config_leaves_out(target, tmp_path):
    tensors = eagle3_tensors(norm="fc_norm", features=2)
    path = write(tmp_path / "eagle3", LLAMA, tensors)
    drafter = CoralDraftModel.from_eagle(path, target, fc_norm=True, target_feature_layers=[1, 3])
    assert_same_logits(drafter, tensors, target)


@pytest.mark.parametrize("norm", [None, "norm_before_fc", "fc_norm"])
@pytest.mark.parametrize("name", ["Eagle3Speculator", "Eagle3DraftModel", "NameOfNextYear", None])
def test_speculators(name, norm, target, tmp_path):
    """The nested config, whose residual is normed by default; the name of the class changes nothing."""
    tensors = eagle3_tensors("layers.0", draft_ids=DRAFT_IDS, norm=norm)
    config = {
        "architectures": name and [name],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": len(DRAFT_IDS),
        "transformer_layer_config": LLAMA,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 3],
        **({} if norm is None else {norm: True}),
    }
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "speculators", config, tensors), target)
    assert_same_logits(drafter, tensors, target, norm_before_residual=True)


@pytest.mark.parametrize("name", ["EagleOfNextYear", "Eagle3DraftModel"])
def test_tensors_say_what_a_checkpoint_is(name, target, tmp_path):
    """The name in `architectures` does not matter, even if it is that of the other shape."""
    tensors = eagle3_tensors("layers.0", draft_ids=DRAFT_IDS)
    config = {**LLAMA, "architectures": [name], "draft_vocab_size": len(DRAFT_IDS)}
    assert_same_logits(
        CoralDraftModel.from_eagle(write(tmp_path / "eagle3", config, tensors), target), tensors, target
    )
    path = write(tmp_path / "eagle", {**LLAMA, "architectures": ["EagleOfNextYear"]}, eagle1_tensors())
    assert CoralDraftModel.from_eagle(path, target).config.shape == "eagle"


def test_offsets_in_int32(target, tmp_path):
    tensors = eagle3_tensors(draft_ids=DRAFT_IDS)
    stored = {**tensors, "d2t": tensors["d2t"].int()}
    config = {**LLAMA, "draft_vocab_size": len(DRAFT_IDS)}
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "eagle3", config, stored), target)
    assert drafter.draft_head.token_ids.dtype == torch.int64
    assert_same_logits(drafter, tensors, target)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sliding_window": 128}, True),
        ({"sliding_window": 128, "layer_types": ["sliding_attention"]}, True),
        ({"sliding_window": 128, "layer_types": ["full_attention"]}, False),
        ({"sliding_window": 128, "use_sliding_window": False}, False),
        ({"sliding_window": None}, False),
    ],
)
def test_a_window_that_is_ignored_is_named(settings, named, target, tmp_path, caplog):
    CoralDraftModel.from_eagle(write(tmp_path / "eagle3", {**LLAMA, **settings}, eagle3_tensors()), target)
    assert ("sliding_window=128" in caplog.text) == named


def test_own_head_over_the_whole_vocabulary(target, tmp_path):
    """The drafter's own head is kept; an exact copy of the target's, also in another dtype, is dropped."""
    tensors = eagle3_tensors() | {"lm_head.weight": noise(VOCAB, HIDDEN, seed=50)}
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "own", LLAMA, tensors), target)
    assert drafter.config.draft_vocab_size == VOCAB
    assert_same_logits(drafter, tensors, target)
    tensors["lm_head.weight"] = target.get_output_embeddings().weight.detach().half()
    drafter = CoralDraftModel.from_eagle(write(tmp_path / "copy", LLAMA, tensors), target)
    assert drafter.config.draft_vocab_size is None and drafter.draft_head is None


def test_overrides_and_own_folder(target, tmp_path):
    """Settings override the checkpoint's, and a drafter with its own head saves and loads like any other."""
    path = write(tmp_path / "eagle3", {**LLAMA, "draft_vocab_size": 10}, eagle3_tensors(draft_ids=DRAFT_IDS))
    drafter = CoralDraftModel.from_eagle(path, target, target_feature_layers=[1, 2, 3], draft_depth=3)
    assert drafter.config.target_feature_layers == [1, 2, 3] and drafter.config.draft_depth == 3
    drafter.save_pretrained(tmp_path / "coral")
    again = CoralDraftModel.from_pretrained(tmp_path / "coral").eval()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert_generates(again, target)


def test_trainer_refuses_own_head(target, tmp_path):
    from coral_hf.training import CoralTrainer, CoralTrainingArguments

    drafter = CoralDraftModel.from_target(target, shape="eagle3", draft_vocab_size=10)
    with pytest.raises(ValueError, match="draft_vocab_size=10"):
        CoralTrainer(drafter, target, CoralTrainingArguments(output_dir=str(tmp_path)), train_dataset=[])


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": "eagle", "draft_vocab_size": 10},
        {"shape": "eagle3", "draft_vocab_size": 0},
        {"shape": "eagle3", "draft_vocab_size": VOCAB + 1},
        {"shape": "eagle3", "draft_vocab_size": 10, "shortlist_size": 5},
        {"shape": "eagle3", "draft_vocab_size": 10, "router_groups": 4},
    ],
)
def test_draft_vocab_size_is_checked(settings, target):
    with pytest.raises(ValueError, match="draft_vocab_size"):
        CoralDraftModel.from_target(target, **settings)
