"""Derives a drafter's settings from its target's configuration."""

import copy
from typing import Any

from transformers import PreTrainedConfig

from .hub_names import hub_commit


def settings_from_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of [`CoralDraftConfig`] that follow from a target.

    Args:
        target_config ([`PreTrainedConfig`]): configuration of a Llama-shaped causal LM (its text part is used).

    Raises:
        ValueError: if the target is an encoder-decoder or lacks a dimension that the drafter needs.
    """
    if getattr(target_config, "is_encoder_decoder", False):
        raise ValueError(
            f"target model_type={target_config.model_type!r} is an encoder-decoder; CORAL drafts for decoder-only "
            "causal language models: choose one of those."
        )
    text = _layer_config(target_config.get_text_config())
    missing = [name for name in ("hidden_size", "num_attention_heads", "vocab_size") if not hasattr(text, name)]
    if missing:
        raise ValueError(
            f"target model_type={text.model_type!r} has no {missing} in its config, which determine a drafter's size: "
            "choose a target of Llama's layout, or see CONTRIBUTING, 'Adding a target family'."
        )
    heads = text.num_attention_heads
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": width[-1] if isinstance(width, list) else width,  # Gemma 3n lists every layer's
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        # Gemma calls it hidden_activation
        "hidden_act": getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None) or "silu",
        "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
        "max_position_embeddings": getattr(text, "max_position_embeddings", None) or 4096,
        "rope_parameters": _target_rope_parameters(text),
        "target_name_or_path": getattr(target_config, "_name_or_path", None) or None,
        "target_revision": hub_commit(target_config),
        "target_model_type": text.model_type,
        "target_num_hidden_layers": getattr(text, "num_hidden_layers", None),
        **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _layer_config(text: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the last full-attention layer, which the drafter follows if layers differ in size (Gemma 4)."""
    if not getattr(text, "is_heterogeneous", False):
        return text
    layers: Any = text.per_layer_config
    kinds = getattr(text, "layer_types", None) or []
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return layers[full[-1] if full else len(layers) - 1]


def _target_rope_parameters(text: PreTrainedConfig) -> dict:
    """RoPE settings for the drafter's one full-attention layer, in full rotary width."""
    rope = copy.deepcopy(getattr(text, "rope_parameters", None)) or {}
    if "full_attention" in rope:  # one dict per layer type (Gemma 3)
        rope = rope["full_attention"]
    theta = rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    partial = rope.pop("partial_rotary_factor", None)
    if rope.get("rope_type", "default") == "default" or (partial or 1.0) != 1.0:
        # Scaling tables of partially rotated heads do not fit fully rotated ones, so only the base is kept.
        return {"rope_type": "default", "rope_theta": float(theta)}
    return {**rope, "rope_theta": float(theta)}


__all__ = ["settings_from_target"]
