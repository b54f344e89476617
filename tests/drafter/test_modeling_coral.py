"""A drafter's first weights, saving and loading bit for bit, and the cache it drafts with."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.rollout_reference import VARIANTS, build, random_inputs
from helpers.tiny_models import FAMILIES, make_drafter, make_target, randomize
from safetensors.torch import load_file
from transformers import AutoModel

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter
from coral_hf.drafter.draft_layer import DraftKeyValues


# Starting weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_target_starts_finite(family, shape):
    target = make_target(family)
    drafter = make_drafter(target, shape, torch.float32)
    embeds, features = random_inputs(drafter, 1, 7)
    with torch.no_grad():
        outputs = drafter(embeds, features, num_steps=3)
    assert all(hidden.isfinite().all() for hidden in outputs.hidden_states)
    assert 0 < drafter.layer.self_attn.q_proj.weight.std() < 0.05
    assert CoralDraftModel.from_target(target, shape=shape).dtype == torch.float32, "whatever the target's dtype"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_the_final_norm_does_what_the_targets_does(family):
    """Gemma stores weight - 1: the copy must behave the same, with other numbers."""
    target = randomize(make_target(family, dtype=torch.float32))
    drafter = make_drafter(target, "eagle3")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(drafter.norm(x), target.get_decoder().norm(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drafter.norm.weight, torch.ones(32), atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_the_eagle_fc_starts_as_the_feature_and_a_share_of_the_embedding(family):
    target = randomize(make_target(family, dtype=torch.float32))
    drafter = make_drafter(target, "eagle")
    embeds = TargetAdapter(target).embed(torch.arange(128))[None]
    with torch.no_grad():
        features = target(torch.arange(128)[None], output_hidden_states=True).hidden_states[-1]
        of_embedding = drafter.fc(torch.cat([embeds, torch.zeros_like(features)], -1))
        of_feature = drafter.fc(torch.cat([torch.zeros_like(embeds), features], -1))
    assert torch.equal(of_feature, features)
    share = of_embedding.square().mean().sqrt() / features.square().mean().sqrt()
    assert 0.15 < share < 0.4


def test_several_features_start_as_the_last_one_and_a_share_of_the_others():
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, target_feature_layers=[1, 2, -1])
    blocks = drafter.fc.weight.unflatten(1, (3, 32))  # [H, n, H]
    assert torch.equal(blocks[:, -1], torch.eye(32))
    features = TargetAdapter(target, [1, 2, -1]).compute_features(torch.arange(3, 120)[None])
    sizes = features.unflatten(-1, (3, 32))[0].square().mean(-1).sqrt().median(0).values  # [n]
    assert sizes[:2].max() > 1.5 * sizes[2] or sizes[:2].min() < sizes[2] / 1.5  # layers of unlike size
    for index in (0, 1):
        part = features.unflatten(-1, (3, 32))[0, :, index] @ blocks[:, index].T
        assert 0.12 < part.square().mean(-1).sqrt().median() / sizes[2] < 0.5


def test_from_target_leaves_the_target_alone():
    target = make_target(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    drafter = randomize(CoralDraftModel.from_target(target))
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    shared = {parameter.data_ptr() for parameter in target.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in drafter.parameters()}


# Saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_exact(variant, dtype, tmp_path):
    drafter = build(variant, dtype)
    embeds, features = random_inputs(drafter, 1, 40)
    with torch.no_grad():
        before = drafter(embeds, features, num_steps=2).hidden_states[1]
    drafter.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {name for name, _ in drafter.named_parameters()}
    assert not any("embed" in name or "head" in name for name in stored)
    for loaded in (CoralDraftModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path, dtype=dtype)):
        assert type(loaded) is CoralDraftModel and loaded.dtype == dtype
        for name, parameter in drafter.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
        with torch.no_grad():
            assert torch.equal(loaded(embeds, features, num_steps=2).hidden_states[1], before)


def test_rope_survives_a_cast():
    """A bf16 `inv_freq` would turn far positions by a radian: casting the drafter must not touch it."""
    drafter = make_drafter(make_target(dtype=torch.float32))
    exact = drafter.rotary_emb.inv_freq.clone()
    for cast in (drafter.to(torch.bfloat16), drafter.half(), drafter.float()):
        assert torch.equal(cast.rotary_emb.inv_freq.float(), exact)


@pytest.mark.slow
def test_round_trip_with_remote_code(tmp_path):
    """The saved folder loads if coral_hf cannot be imported, and drafts if it can."""
    code = f"""
    import sys
    import torch
    from pathlib import Path
    from safetensors.torch import load_file
    folder, target_folder = {str(tmp_path / "drafter")!r}, {str(tmp_path / "target")!r}
    sys.modules["coral_hf"] = None
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    drafter = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(drafter).__module__.startswith("transformers_modules"), type(drafter)
    stored = load_file(Path(folder) / "model.safetensors")
    assert set(stored) == {{name for name, _ in drafter.named_parameters()}}
    assert all(torch.equal(drafter.get_parameter(name), tensor) for name, tensor in stored.items())
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 32
    embeds = torch.zeros(1, 5, 32)
    assert drafter(embeds, embeds, num_steps=3).hidden_states[2].isfinite().all()
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    assert type(drafter).from_target(target).config.hidden_size == 32
    try:
        target.generate(torch.tensor([[5, 9, 3, 77]]), max_new_tokens=4, assistant_model=drafter)
    except AttributeError as error:
        assert "pip install coral-hf" in str(error), error
    else:
        raise AssertionError("Transformers' own loop took a drafter")
    drafter.save_pretrained(folder + "-saved")

    del sys.modules["coral_hf"]
    import coral_hf
    ids = torch.tensor([[5, 9, 3, 77]])
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    drafted = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(plain, drafted)
    assert drafter.last_stats.steps > 0
    """
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    drafter = randomize(make_drafter(target))
    auto_classes = CoralDraftConfig._auto_class, CoralDraftModel._auto_class
    try:
        CoralDraftConfig.register_for_auto_class()
        CoralDraftModel.register_for_auto_class("AutoModel")
        drafter.save_pretrained(tmp_path / "drafter")
    finally:
        CoralDraftConfig._auto_class, CoralDraftModel._auto_class = auto_classes
    written = {path.name for path in (tmp_path / "drafter").glob("*.py")}
    assert {"configuration_coral.py", "modeling_coral.py"} <= written
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


# The cache -----------------------------------------------------------------------------------------------------


def test_draft_key_values_grow_and_keep_what_they_hold():
    config = CoralDraftConfig(hidden_size=8, num_attention_heads=2, head_dim=4, vocab_size=8)
    cache = DraftKeyValues(config, 3, torch.float64, "cpu")
    first = torch.arange(1, 17, dtype=torch.float64).view(1, 2, 2, 4)
    cache.write(0, first, -first)
    cache.length = 2
    assert cache.max_length == 3
    more = torch.full((1, 2, 5, 4), 7.0, dtype=torch.float64)
    cache.write(2, more, -more)
    assert cache.max_length == 7 and cache.length == 2
    assert torch.equal(cache.keys[:, :, :2], first) and torch.equal(cache.values[:, :, :2], -first)
    assert torch.equal(cache.keys[:, :, 2:7], more) and torch.equal(cache.values[:, :, 2:7], -more)
    cache.write(7, more[:, :, :1], more[:, :, :1])
    assert cache.max_length == 14, "one token too many doubles the buffer, so that growing stays rare"
    cache.write(2, -more, more)
    assert torch.equal(cache.keys[:, :, 2:7], -more), "scratch is overwritten"
