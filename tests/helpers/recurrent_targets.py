"""Tiny targets that mix attention with recurrent layers, like recent models."""

import torch
from helpers.tiny_models import COMMON, randomize
from helpers.unusual_targets import finish, needs
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


ALTERNATE = {"layer_types": ["linear_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 32}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
# By model_type, each with what its config says beside the sizes that all tiny targets have.
HYBRIDS = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **MAMBA2,
        **ALTERNATE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8},
    "lara_mini": {**DELTA, **SHARED_EXPERT, "head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {**DELTA, **ALTERNATE},
    "qwen3_5_moe_text": {**DELTA, **ALTERNATE, **SHARED_EXPERT, "head_dim": 16},
    "qwen3_5_text": {**DELTA, **ALTERNATE, "head_dim": 16},
    "qwen3_next": {**DELTA, **ALTERNATE, **SHARED_EXPERT, "head_dim": 16},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "use_mem_rope": True,
    },
}
CONVOLUTIONS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, **EXPERTS, "num_dense_layers": 1},
}
STATES = {**HYBRIDS, **CONVOLUTIONS}


def make_hybrid(family: str, dtype: torch.dtype = torch.float64, attention: str = "eager", **settings):
    """A tiny random target of a family of `STATES`; the test is skipped if Transformers lacks the family."""
    needs(family)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**COMMON, "tie_word_embeddings": False, **STATES[family], **settings})
    # grouped products of experts take no float64
    kinds = {"attn_implementation": attention, "experts_implementation": "eager"}
    return randomize(finish(AutoModelForCausalLM.from_config(config, **kinds)), scale=0.1).to(dtype)
