"""SGLang's own classes load the exported drafter and draft the same tokens: skipped unless SGLang is installed.

In an environment with SGLang and without vLLM: `CUDA_VISIBLE_DEVICES= python -m pytest tests/engines/test_engine_loaders*.py`.
On a CPU `sgl_kernel` (GPU kernels) and torchvision are imported on the way to the models but not called here: stubs stand
in for them where they are missing. Only attention over the paged cache is replaced. Versions and results of the last run:
`benchmarks/records/engine_loaders.json`.
"""

import importlib.machinery
import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import MagicMock

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
from transformers import AutoConfig

from coral_hf.conversion import export_drafter


if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)

NAMES = [name for name, (_, engines) in DRAFTERS.items() if "sglang" in engines]


class Stubs:
    """Finds and loads, for each missing package, modules with any requested attribute."""

    def __init__(self, *packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __spec__=spec, __path__=[])

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


@pytest.fixture(scope="module", autouse=True)
def engine():
    """SGLang's CPU engine, its settings published, and the tensor-parallel group of one process."""
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29557")
    stubs = Stubs(*(name for name in ("sgl_kernel", "torchvision") if find_spec(name) is None))
    sys.meta_path.insert(0, stubs)
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy", device="cpu"), role="test", ranks=SpawnRanks(world_rank=0, dp_rank=None))
    init_distributed_environment(1, 0, "env://", 0, backend="gloo")
    initialize_model_parallel(backend="gloo")
    yield
    sys.meta_path.remove(stubs)


def load(folder, dtype):
    """SGLang's model of a folder."""
    from sglang.srt.models.llama import LlamaForCausalLM
    from sglang.srt.models.llama_eagle import LlamaForCausalLMEagle
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

    config = AutoConfig.from_pretrained(folder)
    classes = {each.__name__: each for each in (LlamaForCausalLM, LlamaForCausalLMEagle, LlamaForCausalLMEagle3)}
    torch.set_default_dtype(dtype)
    try:
        model = classes[config.architectures[0]](config)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        model.load_weights(list(load_file(folder / "model.safetensors").items()))
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attn = CausalAttention(layer.self_attn.head_dim)
    return model


def batch(features=None):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    spec_info = SimpleNamespace(hidden_states=features)
    return SimpleNamespace(spec_info=spec_info, mm_input_embeds=None, forward_mode=ForwardMode.DECODE)


@pytest.mark.parametrize("name", NAMES)
def test_sglang_loads_every_weight(name, target, tmp_path):
    drafter = make(name, target, torch.bfloat16)
    export_drafter(drafter, "sglang", tmp_path / "out")
    model, tensors = load(tmp_path / "out", torch.bfloat16), load_file(tmp_path / "out" / "model.safetensors")
    unloaded = {key for key, value in model.named_parameters() if value.isnan().any()}
    # embedding and, unless the drafter has its own, head are the target's
    assert unloaded == {"model.embed_tokens.weight", "lm_head.weight"} - set(tensors)
    prefix = "layers.0" if drafter.config.shape == "eagle" else "midlayer"
    projections = torch.cat([tensors[f"{prefix}.self_attn.{kind}_proj.weight"] for kind in "qkv"])
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight, projections)
    assert torch.equal(model.model.fc.weight, tensors["fc.weight"])
    assert_same_norms(model.model, drafter, tensors)
    if drafter.config.shape == "eagle":
        assert torch.equal(model.model.fc.bias, tensors["fc.bias"])
    else:
        assert model.load_lm_head_from_target == (drafter.draft_head is None)
    if drafter.draft_head is not None:
        assert torch.equal(model.get_hot_token_id(), DRAFT_IDS)
        assert torch.equal(model.lm_head.weight[: len(DRAFT_IDS)], tensors["lm_head.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_sglang_drafts_the_same(name, target, tmp_path):
    """One drafting step through SGLang's own forward, in float32."""
    draft_once(make(name, target), target, tmp_path)


@pytest.mark.real_model
def test_sglang_drafts_the_same_with_the_shipped_drafter(tmp_path):
    draft_once(*shipped_pair(), tmp_path, tolerance=1e-4)


@torch.no_grad()
def draft_once(drafter, target, tmp_path, tolerance=1e-5):
    export_drafter(drafter, "sglang", tmp_path / "out")
    model = load(tmp_path / "out", torch.float32)
    model.model.embed_tokens.weight.data.copy_(target.get_input_embeddings().weight)
    ids, features, expected = one_step(drafter, target)
    found = model.model(ids, torch.arange(len(ids)), batch(features))
    found, fed_back = (found, found) if drafter.config.shape == "eagle" else (found[0], found[1][0])
    assert_same_step(drafter, found, fed_back, expected, tolerance)


@torch.no_grad()
def test_sglang_reads_inputs_of_layers(target, tmp_path):
    """Ids name layers whose output is read as the input of the next, so the last layer's output is not available.

    So there is no id for the last state, normed or not.
    """
    target.save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    ids = torch.tensor([5, 9, 3, 77, 31, 8, 100, 64])
    states = target(ids[None], output_hidden_states=True).hidden_states
    model.set_eagle3_layers_to_capture([1, 4, 7])
    normed, captured = model.model(ids, torch.arange(len(ids)), batch())
    torch.testing.assert_close(normed, states[-1][0], rtol=1e-4, atol=1e-4)
    assert len(captured) == 2
    for state, layer in zip(captured, (2, 5), strict=True):
        torch.testing.assert_close(state, states[layer][0], rtol=1e-4, atol=1e-4)
