"""Drafters of every kind that engines accept or refuse, the contents of exported folders, and a step to compare."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.tiny_models import COMMON, make_drafter, randomize
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from coral_hf import demo
from coral_hf.conversion import ENGINES
from coral_hf.drafter.target_adapter import TargetAdapter


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
    "eagle3, norm before fc": ({**THREE, "norm_before_fc": True}, ("vllm", "sglang", "speculators")),
    "eagle3, a norm for each feature": (
        {"shape": "eagle3", "target_feature_layers": [1, 6], "norm_output": False, "fc_norm": True},
        ("vllm", "sglang", "speculators"),
    ),
    "eagle3, head of its own": ({**THREE, "norm_output": False, "draft_vocab_size": 10}, ENGINES),
}
PAIRS = [(name, engine) for name, (_, engines) in DRAFTERS.items() for engine in engines]


def eight_layer_target():
    """Deep enough for EAGLE-3's default features 2, 4, 5 to be three different ones."""
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


def shipped_pair():
    """The shipped drafter and the real target, in float32."""
    return demo.load_drafter(torch.float32), demo.load_target(torch.float32)[0]


class CausalAttention(torch.nn.Module):
    """Replaces an engine's attention over its paged cache: one sequence's rotated `[S, heads * d]`, causally."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, query, key, value, *_, **__):
        heads = (rows.view(len(rows), -1, self.head_dim).transpose(0, 1)[None] for rows in (query, key, value))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)  # [1, heads, S, d]
        return attended[0].transpose(0, 1).flatten(1)


@torch.no_grad()
def one_step(drafter, target):
    """Ids `[S]`, target features `[S, n * H]` and the expected input of the LM head `[S, H]`, for one drafting step."""
    ids = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])
    features = TargetAdapter(target, drafter.config.target_feature_layers).compute_features(ids)[:, :-1]
    expected = drafter(target.get_input_embeddings()(ids[:, 1:]), features).hidden_states[0]
    return ids[0, 1:], features[0], expected[0]


def assert_same_step(drafter, found, fed_back, expected, tolerance=1e-5):
    """The input of an engine's head, and the state that it feeds back: after the norm or before it."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        again = fed_back if drafter.config.norm_output else drafter.norm(fed_back)
    torch.testing.assert_close(again, expected, rtol=tolerance, atol=tolerance)


def assert_same_norms(model, drafter, tensors):
    """An engine's model has the drafter's norms before `fc`, with the weights of the folder."""
    names = ("input_norm.", "fc_norm.")
    found = {name: value for name, value in model.named_parameters() if name.startswith(names)}
    expected = {name for name in drafter.state_dict() if name.startswith(names)}
    assert set(found) == {name for name in tensors if name.startswith(names)} == expected
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())


def assert_same_drafter(found, expected, leave_out=()):
    state = {name: tensor for name, tensor in expected.state_dict().items() if name.split(".")[0] not in leave_out}
    assert set(found.state_dict()) == set(state)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    ignored = {"architectures", "shortlist_size", "router_groups", "router_active_groups", "router_hidden_size"}
    ignored |= {
        "low_rank_size",
        "low_rank_candidates",
        "router_grouping",
        "_name_or_path",
        "transformers_version",
        "dtype",
        "auto_map",
    }
    settings = {key: value for key, value in expected.config.to_dict().items() if key not in ignored}
    assert {key: value for key, value in found.config.to_dict().items() if key not in ignored} == settings


def read(folder: Path):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
