"""Starting weights of a drafter, taken from its target where the shapes allow."""

from typing import Any

import torch
from torch import nn

from .configuration_coral import CoralDraftConfig, vocab_hash
from .target_adapter import TargetAdapter


def initialize_from_target(model_class: type, target: nn.Module, tokenizer: Any, overrides: dict[str, Any]):
    """Builds an untrained drafter for `target`, see `CoralDraftModel.from_target`.

    The decoder layer starts as the target's last one and the final norm as the target's: training then starts from
    something that already maps late features to late features (on SmolLM2-135M it halves the tokens needed to reach a
    given acceptance; see the drafter's folder for the measurement). What the target has no counterpart for starts
    random or, where a matrix reads the feature, as the identity.

    Raises:
        ValueError: if the target is not a Llama-shaped causal LM.
    """
    config = CoralDraftConfig.from_target(target.config, **overrides)
    adapter = TargetAdapter(target, config.target_feature_layers)
    if tokenizer is not None:
        config.target_vocab_hash = vocab_hash(tokenizer)
    drafter = model_class(config).float()
    decoder = adapter.target.get_decoder()
    with torch.no_grad():
        copy_decoder_layer(drafter.layer, decoder.layers[-1], config)
        if config.shape == "eagle3":
            _copy_norm(drafter.norm, getattr(decoder, "norm", None), config.hidden_size)
            if config.num_target_features > 1:
                # Start as the mean of the features.
                drafter.fc.weight.copy_(_identity_blocks(drafter.fc.weight, config.num_target_features))
        else:
            size = config.hidden_size
            drafter.fc.weight[:, size:] = torch.eye(size)
    return drafter


def _identity_blocks(weight: torch.Tensor, blocks: int) -> torch.Tensor:
    return torch.eye(weight.shape[0]).repeat(1, blocks) / blocks


def _copy_norm(norm: nn.Module, source: nn.Module | None, size: int) -> None:
    """Copies an RMSNorm in our convention (plain weight), whatever the source's is (Gemma stores weight - 1)."""
    weight = getattr(source, "weight", None)
    if weight is None or weight.shape != (size,):
        return
    # A power of two whose square drowns epsilon: its normalised value is exactly 1.
    constant = torch.full((1, size), 2.0**14, dtype=weight.dtype, device=weight.device)
    norm.weight.copy_(source(constant)[0].float().cpu())


def copy_decoder_layer(layer: nn.Module, source: nn.Module, config: CoralDraftConfig) -> None:
    """Copies attention output, MLP and (into the feature half) q/k/v of a target layer, fused layouts included."""
    attention, mlp = getattr(source, "self_attn", None), getattr(source, "mlp", None)
    if attention is None or mlp is None:
        return
    for name, weight in _attention_weights(attention, config).items():
        _copy_columns(getattr(layer.self_attn, name).weight, weight)
    for name, weight in _mlp_weights(mlp).items():
        _copy_columns(getattr(layer.mlp, name).weight, weight)
    # OLMo 2's norms follow the sublayers; a norm of the same name there means something else.
    if hasattr(source, "input_layernorm"):
        _copy_norm(layer.post_attention_layernorm, _norm_before_mlp(source), config.hidden_size)


def _norm_before_mlp(source: nn.Module) -> nn.Module | None:
    return getattr(source, "pre_feedforward_layernorm", None) or getattr(source, "post_attention_layernorm", None)


def _attention_weights(attention: nn.Module, config: CoralDraftConfig) -> dict[str, torch.Tensor]:
    weights = {name: _weight(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    fused = _weight(attention, "qkv_proj")  # Phi-3
    if fused is not None:
        query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if fused.shape[0] == query + 2 * key_value:
            weights["q_proj"], weights["k_proj"], weights["v_proj"] = fused.split([query, key_value, key_value])
    return {name: weight for name, weight in weights.items() if weight is not None}


def _mlp_weights(mlp: nn.Module) -> dict[str, torch.Tensor]:
    weights = {name: _weight(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
    fused = _weight(mlp, "gate_up_proj")  # Phi-3
    if fused is not None:
        weights["gate_proj"], weights["up_proj"] = fused.chunk(2)
    return {name: weight for name, weight in weights.items() if weight is not None}


def _weight(module: nn.Module, name: str) -> torch.Tensor | None:
    """A submodule's weight if it is an ordinary floating-point matrix (a quantised one is left alone)."""
    weight = getattr(getattr(module, name, None), "weight", None)
    return weight if weight is not None and weight.is_floating_point() and weight.dim() == 2 else None


def _copy_columns(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copies into the last columns (the feature half of a 2H-wide projection); other shapes stay as they are."""
    if source.device.type == "meta" or source.shape[0] != destination.shape[0]:
        return
    if source.shape[1] <= destination.shape[1]:
        destination[:, -source.shape[1] :] = source.float().cpu()
