"""vLLM's own classes load what is exported for it: skipped unless vLLM is installed (its wheel needs no GPU for this).

In an environment with vLLM: `CUDA_VISIBLE_DEVICES= python -m pytest tests/test_engine_loaders.py`. SGLang's wheel
imports GPU packages that have no CPU build; its names, shapes and keys are held by `conversion/schemas.json` alone.
"""

import os

import pytest
import torch
from engine_drafters import DRAFT_IDS, DRAFTERS, eight_layer_target, make
from safetensors.torch import load_file

from coral_hf.conversion import export_drafter


pytest.importorskip("vllm", reason="vLLM is not installed")

PAIRS = [(name, engine) for name, (_, engines) in DRAFTERS.items() for engine in engines if engine != "eagle"]
# The target's own, shared by vLLM after loading
SHARED = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


@pytest.fixture(scope="module")
def process_group():
    """vLLM's layers ask for a tensor-parallel group, and for a platform."""
    import vllm.platforms
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.platforms.cpu import CpuPlatform

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    vllm.platforms._current_platform = CpuPlatform()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "env://", 0, backend="gloo")
        initialize_model_parallel(1, 1)


@pytest.mark.parametrize(("name", "engine"), [pair for pair in PAIRS if pair[1] != "sglang"])
def test_vllm_loads_every_weight(name, engine, target, process_group, tmp_path):
    from vllm.config import CompilationConfig, DeviceConfig, ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.config import set_current_vllm_config as current
    from vllm.model_executor.models.registry import ModelRegistry

    drafter = make(name, target, torch.bfloat16)
    target.save_pretrained(tmp_path / "target")
    export_drafter(drafter, engine, tmp_path / "out", target_name=str(tmp_path / "target"))
    served = ModelConfig(model=str(tmp_path / "target"), dtype="bfloat16", max_model_len=128)
    speculative = SpeculativeConfig(
        method=drafter.config.shape,
        model=str(tmp_path / "out"),
        num_speculative_tokens=3,
        target_model_config=served,
        target_parallel_config=ParallelConfig(),
    )
    config = VllmConfig(
        model_config=served,
        speculative_config=speculative,
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(mode=0),
    )
    read = speculative.draft_model_config.hf_config
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    with current(config):
        model_class, _ = ModelRegistry.resolve_model_cls(read.architectures, speculative.draft_model_config)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = model_class(vllm_config=config, prefix="draft")
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data.fill_(float("nan"))
            model.load_weights(list(tensors.items()))
        finally:
            torch.set_default_dtype(torch.float32)
    unloaded = {key for key, value in model.named_parameters() if value.is_floating_point() and value.isnan().any()}
    assert unloaded <= SHARED
    projections = torch.cat([tensors[f"layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"])
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight, projections)
    if "fc.weight" in tensors:
        assert torch.equal(model.model.fc.weight, tensors["fc.weight"])
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
