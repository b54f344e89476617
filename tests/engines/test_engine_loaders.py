"""vLLM's own classes load the exported drafter and draft the same tokens: skipped unless vLLM is installed.

Its wheel needs no GPU for this: `CUDA_VISIBLE_DEVICES= python -m pytest tests/engines/test_engine_loaders*.py` in an environment
with vLLM; SGLang and speculators have files of their own. Only attention over the paged cache is replaced. Versions and
results of the last run: `benchmarks/records/engine_loaders.json`.
"""

import os

import pytest
import torch
from helpers.engine_drafters import (
    DRAFT_IDS,
    DRAFTERS,
    CausalAttention,
    assert_same_norms,
    assert_same_step,
    eight_layer_target,
    make,
    one_step,
    shipped_pair,
)
from safetensors.torch import load_file

from coral_hf.conversion import export_drafter


pytest.importorskip("vllm", reason="vLLM is not installed")

PAIRS = [(name, engine) for name, (_, engines) in DRAFTERS.items() for engine in ("vllm", "speculators")]
PAIRS = [(name, engine) for name, engine in PAIRS if engine in DRAFTERS[name][1]]
# The target's own, shared by vLLM after loading
SHARED = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


@pytest.fixture(scope="module")
def process_group():
    """vLLM's layers need a tensor-parallel group and a platform."""
    import vllm.platforms
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.platforms.cpu import CpuPlatform

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    vllm.platforms._current_platform = CpuPlatform()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "env://", 0, backend="gloo")
        initialize_model_parallel(1, 1)


def load(folder, served_folder, dtype, method=None):
    """vLLM's model of a drafter's folder, or without `method` of a target's, and the config that vLLM made of it."""
    from vllm.config import CompilationConfig, DeviceConfig, ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.config import set_current_vllm_config as current
    from vllm.model_executor.models.registry import ModelRegistry

    served = ModelConfig(model=str(served_folder), dtype=dtype, max_model_len=128)
    speculative = method and SpeculativeConfig(
        method=method,
        model=str(folder),
        num_speculative_tokens=3,
        target_model_config=served,
        target_parallel_config=ParallelConfig(),
    )
    config = VllmConfig(
        model_config=served,
        speculative_config=speculative,
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(mode=0, custom_ops=["none"]),
    )
    read = speculative.draft_model_config if method else served
    with current(config):
        model_class, _ = ModelRegistry.resolve_model_cls(read.hf_config.architectures, read)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = model_class(vllm_config=config, prefix="draft" if method else "")
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data.fill_(float("nan"))
            model.load_weights(list(load_file(folder / "model.safetensors").items()))
        finally:
            torch.set_default_dtype(torch.float32)
    return model, read.hf_config


def make_ready(model):
    """What vLLM's loader does after loading: CPU kernels for each layer. Attention uses no paged cache."""
    for module in model.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)
    for layer in model.model.layers:
        layer.self_attn.attn = CausalAttention(layer.self_attn.head_dim)


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_vllm_loads_every_weight(name, engine, target, process_group, tmp_path):
    drafter = make(name, target, torch.bfloat16)
    target.save_pretrained(tmp_path / "target")
    export_drafter(drafter, engine, tmp_path / "out", target_name=str(tmp_path / "target"))
    model, read = load(tmp_path / "out", tmp_path / "target", "bfloat16", drafter.config.shape)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    unloaded = {key for key, value in model.named_parameters() if value.is_floating_point() and value.isnan().any()}
    assert unloaded <= SHARED
    projections = torch.cat([tensors[f"layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"])
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight, projections)
    if "fc.weight" in tensors:
        assert torch.equal(model.model.fc.weight, tensors["fc.weight"])
    assert_same_norms(model.model, drafter, tensors)
    assert read.rope_parameters["rope_theta"] == drafter.config.rope_parameters["rope_theta"]
    if drafter.config.shape == "eagle3":
        assert model.model.norm_output == drafter.config.norm_output
        assert read.norm_before_residual == drafter.config.norm_before_residual
        layers = getattr(read, "eagle_aux_hidden_state_layer_ids", None)
        assert layers == (drafter.config.target_feature_layers if drafter.config.num_target_features > 1 else None)
    if drafter.draft_head is not None:
        rows = torch.arange(len(DRAFT_IDS))
        assert torch.equal(rows + model.draft_id_to_target_id, DRAFT_IDS)
        assert torch.equal(model.lm_head.weight[: len(rows)], tensors["lm_head.weight"])


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_vllm_drafts_the_same(name, engine, target, process_group, tmp_path):
    """One drafting step through vLLM's own forward, in float32."""
    draft_once(make(name, target), target, engine, tmp_path)


@pytest.mark.real_model
@pytest.mark.parametrize("engine", ["vllm", "speculators"])
def test_vllm_drafts_the_same_with_the_shipped_drafter(engine, process_group, tmp_path):
    draft_once(*shipped_pair(), engine, tmp_path, tolerance=1e-4)


def draft_once(drafter, target, engine, tmp_path, tolerance=1e-5):
    target.save_pretrained(tmp_path / "target")
    export_drafter(drafter, engine, tmp_path / "out", target_name=str(tmp_path / "target"))
    model, _ = load(tmp_path / "out", tmp_path / "target", "float32", drafter.config.shape)
    model.model.embed_tokens.weight.data.copy_(target.get_input_embeddings().weight)
    make_ready(model)
    ids, features, expected = one_step(drafter, target)
    with torch.no_grad():
        combined = model.combine_hidden_states(features) if drafter.config.shape == "eagle3" else features
        found, fed_back = model.model(input_ids=ids, positions=torch.arange(len(ids)), hidden_states=combined)
    assert_same_step(drafter, found, fed_back, expected, tolerance)


@torch.no_grad()
def test_vllm_reads_the_last_layer_before_its_norm(target, process_group, tmp_path):
    """Ids name residual streams before layers. The number of layers names the one before the final norm.

    So the normed last state, CORAL's -1, cannot be combined with others.
    """
    target.save_pretrained(tmp_path)
    model, _ = load(tmp_path, tmp_path, "float32")
    make_ready(model)
    model.set_aux_hidden_state_layers((0, 2, 5, 8))
    ids = torch.tensor([5, 9, 3, 77, 31, 8, 100, 64])
    normed, captured = model.model(ids, torch.arange(len(ids)), None)
    states = target(ids[None], output_hidden_states=True).hidden_states
    for state, layer in zip(captured, (0, 2, 5), strict=False):
        torch.testing.assert_close(state, states[layer][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed, states[-1][0], rtol=1e-4, atol=1e-4)
    assert len(captured) == 4 and not torch.allclose(captured[-1], states[-1][0], atol=0.1)
    torch.testing.assert_close(target.model.norm(captured[-1]), states[-1][0], rtol=1e-4, atol=1e-4)
