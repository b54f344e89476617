"""Tiny targets other than plain text decoders, shared by the tests of trees, chains and refusals."""

import pytest
import torch
from helpers.parity import prompt_of
from helpers.tiny_models import COMMON, FAMILIES, randomize
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
# No attention layer, and states outside of the cache.
RECURRENT = {
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
}
CHAINS_ONLY = {
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
}

# Their forwards know no positions of a tree's nodes, or make their own masks.
GPT = {"vocab_size": 128, "num_attention_heads": 4}
POSITIONLESS = {
    "mpt": {"vocab_size": 128, "d_model": 32, "n_heads": 4, "n_layers": 4},
    "bloom": {**GPT, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": {**GPT, "hidden_size": 32, "num_hidden_layers": 4, "alibi": True},
    "gpt_neo": {
        **GPT,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
    }
    | {"window_size": 8},
    "bart": {**GPT, "d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    | {"is_decoder": True, "is_encoder_decoder": False},
}


# Gemma 4 and 3n as they come: full-attention layers of other head sizes, and last layers that read the keys of earlier ones
PER_LAYER = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
GEMMA_3N = {"laurel_rank": 4, "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4}


# Multi-head latent attention with an index that chooses the keys attended to. Its scores are sums of what is not negative
# over heads: many heads, or tiny models have ties among zeros.
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
INDEX = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}


def needs(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {family}")


def build(family: str, settings: dict, attention: str = "eager", **kinds):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**COMMON, **settings})
    return finish(AutoModelForCausalLM.from_config(config, attn_implementation=attention, **kinds))


def build_positionless(family: str, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**POSITIONLESS[family], "tie_word_embeddings": False, **settings})
    target = finish(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    target.generation_config.use_cache = True
    return randomize(target)


def finish(target):
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target.double().eval()


def image_target(kind: str, attention: str):
    """A model, a prompt whose first tokens (127) are an image, and the arguments of `generate` for it."""
    patches = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    start = [5, 125, 127, 127, 127, 127, 126]
    if kind == "gemma3":
        text = {**COMMON, **FAMILIES["gemma3_text"], "tie_word_embeddings": False}
        settings = {
            "vision_config": {**VISION, "image_size": 16},
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": False,
        }
        settings |= {"boi_token_index": 125, "eoi_token_index": 126, "image_token_index": 127}
        inputs = {"pixel_values": patches}
    elif kind == "llava":
        text = {**COMMON, "model_type": "llama"}
        vision = {**VISION, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16}
        settings = {"vision_config": vision, "image_token_index": 127, "image_seq_length": 4}
        inputs = {"pixel_values": patches[..., :8, :8]}
    else:
        text = {**COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
        settings = {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}}
        settings |= {
            "image_token_id": 127,
            "video_token_id": 124,
            "vision_start_token_id": 125,
            "vision_end_token_id": 126,
        }
        inputs = {
            "pixel_values": patches.expand(2, -1, -1, -1).reshape(16, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    ids = torch.cat([torch.tensor([start]), prompt_of(24).clamp(max=120)], dim=1)
    if kind == "gemma3":
        inputs["token_type_ids"] = (ids == 127).int()
    elif kind == "qwen2_vl":
        inputs["mm_token_type_ids"] = (ids == 127).int()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](text_config=text, **settings)
    return finish(AutoModelForImageTextToText.from_config(config, attn_implementation=attention)), ids, inputs


def build_indexed(family: str):
    """A target of sparse attention that chooses 8 keys: fewer than the prompts of the tests have."""
    return build(family, {**MLA, **INDEX}, experts_implementation="eager")  # grouped products take no float64


def cross_attending_target():
    """Llama 3.2 Vision: a target whose second layer attends to an image instead of the text, and a prompt with one."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 32}
    vision |= {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}
    text = {**COMMON, "model_type": "mllama_text_model", "cross_attention_layers": [1]}
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mllama"](vision_config=vision, text_config=text, image_token_index=127)
    target = finish(AutoModelForImageTextToText.from_config(config))
    image = {
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8).double(),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 10, 1, 1, dtype=torch.long),
    }
    return target, torch.cat([torch.tensor([[5, 127]]), prompt_of(8).clamp(max=120)], dim=1), image
