"""Drafters of every kind that engines hold or refuse, and what a folder exported for one of them holds."""

import json
from pathlib import Path

import torch
from conftest import COMMON, make_drafter, randomize
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from coral_hf.conversion import ENGINES


DRAFT_IDS = torch.tensor([3, 5, 6, 20, 21, 40, 77, 90, 100, 127])
THREE = {"shape": "eagle3", "target_feature_layers": [2, 4, 5]}
# name -> (settings of the drafter, engines that can hold it)
DRAFTERS = {
    "eagle": ({"shape": "eagle"}, ("vllm", "sglang", "eagle")),
    "eagle with fc bias": ({"shape": "eagle", "fc_bias": True}, ("sglang", "eagle")),
    "eagle with q/k/v bias": ({"shape": "eagle", "attention_bias": True}, ("eagle",)),
    "eagle3, one feature": ({"shape": "eagle3"}, ("vllm",)),
    "eagle3, three features": (THREE, ("vllm", "sglang", "speculators")),
    "eagle3, pre-norm state fed back": ({**THREE, "norm_output": False}, ENGINES),
    "eagle3, two other features": (
        {"shape": "eagle3", "target_feature_layers": [1, 6], "norm_output": False},
        ("vllm", "sglang", "speculators"),
    ),
    "eagle3, normed residual": (
        {**THREE, "norm_before_residual": True, "norm_output": False},
        ("vllm", "speculators"),
    ),
    "eagle3, head of its own": ({**THREE, "norm_output": False, "draft_vocab_size": 10}, ENGINES),
}
PAIRS = [(name, engine) for name, (_, engines) in DRAFTERS.items() for engine in engines]


def eight_layer_target():
    """So that EAGLE-3's default features 2, 4, 5 are three."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**{**COMMON, "num_hidden_layers": 8}))
    target.generation_config.eos_token_id = None
    return target.float().eval()


def make(name, target, dtype=torch.float32):
    settings = {"draft_depth": 3, "target_name_or_path": "org/target", **DRAFTERS[name][0]}
    drafter = randomize(make_drafter(target, dtype=torch.float32, **settings), scale=0.1).to(dtype)
    if drafter.draft_head is not None:
        drafter.draft_head.token_ids.copy_(DRAFT_IDS)
    return drafter


def assert_same_drafter(found, expected, leave_out=()):
    state = {name: tensor for name, tensor in expected.state_dict().items() if name.split(".")[0] not in leave_out}
    assert set(found.state_dict()) == set(state)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    ignored = {"architectures", "shortlist_size", "router_groups", "router_active_groups", "router_hidden_size"}
    ignored |= {"router_grouping", "_name_or_path", "transformers_version", "dtype"}
    settings = {key: value for key, value in expected.config.to_dict().items() if key not in ignored}
    assert {key: value for key, value in found.config.to_dict().items() if key not in ignored} == settings


def read(folder: Path):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
