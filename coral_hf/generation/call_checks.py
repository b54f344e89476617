"""Rejects calls that the decode loop does not support, before any forward pass."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from ..drafter.target_adapter import active_prompt
from ..utils.compat import cache_of
from .key_values.dynamic import check_cache
from .key_values.paths import store_obstacle, takes_tree_masks, tree_obstacle
from .key_values.recurrent_layers import check_recurrence
from .settings import DraftSettings


# Tensor arguments of `generate` that a prefill in chunks can split or does not read.
_SPLIT_INPUTS = {"attention_mask", "position_ids", "inputs_tensor"}
_CROSS_ATTENTION_INPUTS = {
    "cross_attention_states",
    "cross_attention_mask",
    "encoder_hidden_states",
    "encoder_outputs",
}


def check_call(
    target: PreTrainedModel,
    settings: DraftSettings,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Raises `ValueError` for unsupported calls, before any forward pass. Measuring draft costs takes many of them."""
    if (
        generation_config.return_dict_in_generate
        and generation_config.output_attentions
        and not settings.draft_stock_loop
    ):
        raise ValueError(
            "CORAL verifies trees, whose attentions are not those of a sequence: set output_attentions=False."
        )
    chunk = generation_config.prefill_chunk_size
    if chunk is not None and not settings.draft_stock_loop:
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"prefill_chunk_size={chunk!r} must be a positive number of tokens, or None.")
        others = {name for name, value in model_kwargs.items() if _holds_tensors(value)} - _SPLIT_INPUTS
        if others and chunk < input_ids.shape[1]:
            raise ValueError(
                f"prefill_chunk_size={chunk} splits ids, positions and attention mask of a prompt, but not "
                f"{', '.join(sorted(others))}. Set prefill_chunk_size=None."
            )
    check_ids(input_ids)
    if model_kwargs.get("use_cache") is False:
        raise ValueError("CORAL needs the target's KV cache, but use_cache=False disables it. Set use_cache=True.")
    cache = cache_of(model_kwargs)
    if cache is None:
        raise ValueError(
            f"{type(target).__name__} keeps no KV cache from which drafts could be dropped (a recurrent model?); "
            "generate without assistant_model."
        )
    for name, module in (("embedding", target.get_input_embeddings()), ("LM head", target.get_output_embeddings())):
        if module is not None and module.weight.device.type == "meta":
            raise ValueError(
                f"The {name} of {type(target).__name__} is offloaded, but every draft step needs it: give it a device "
                "in device_map."
            )
    _check_adapters(target)
    _check_prompts(target)
    _check_cross_attention(target, cache, model_kwargs)
    config = target.config.get_text_config()
    own = {type(layer) for layer in DynamicCache(config=config).layers}
    kinds = getattr(config, "layer_types", None) or []
    check_cache(cache, branches=not settings.is_chain, layer_types=kinds, own_layers=own)
    check_recurrence(target, cache, branches=not settings.is_chain)
    if not settings.is_chain:  # last, because its remedy, a chain, must pass the checks above
        _check_branches(target)
    if input_ids.shape[0] > 1:
        _check_batch(target, settings, cache, model_kwargs.get("attention_mask"), input_ids, generation_config)


def check_ids(input_ids: torch.Tensor) -> None:
    """Raises `ValueError` for empty prompts `[B, 0]`."""
    if input_ids.shape[1] == 0:
        raise ValueError(
            "input_ids is empty, and CORAL drafts from token ids: pass a prompt of at least one token, not inputs_embeds."
        )


def _check_batch(
    target: PreTrainedModel,
    settings: DraftSettings,
    cache: Cache,
    mask: torch.Tensor | None,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
) -> None:
    """Raises `ValueError` for a batch with padding elsewhere than on the left, or one that the store does not support."""
    if settings.draft_stock_loop:
        raise ValueError(
            f"draft_stock_loop=True drafts for one sequence; got a batch of {len(input_ids)}. Leave draft_stock_loop=False, or "
            "call generate once per prompt."
        )
    if mask is not None and mask.ndim == 2:
        for row, tokens in enumerate(mask.tolist()):
            if not any(tokens):
                raise ValueError(
                    f"Prompt {row} of the batch is empty: its attention mask is 0 everywhere. Leave it out."
                )
            if sorted(tokens) != tokens:
                raise ValueError(
                    f"Prompt {row} of the batch has padding, or a hole in its attention mask, after its first token. Pad on "
                    "the left (tokenizer.padding_side = 'left')."
                )
    if (problem := store_obstacle(target, cache, mask, generation_config.max_length)) is not None:
        raise ValueError(
            f"CORAL cannot draft for a batch of {len(input_ids)} with this target: {problem}. Call generate once per prompt, "
            "or without assistant_model."
        )


def _check_branches(target: PreTrainedModel) -> None:
    """Raises `ValueError` for a target whose attention does not use a tree's mask and positions."""
    config = target.config.get_text_config()
    attention = config._attn_implementation
    if not takes_tree_masks(target):
        raise ValueError(
            f"attn_implementation={attention!r} takes no tree mask. Load the target with attn_implementation='sdpa', "
            "or draft a chain with draft_top_k=1."
        )
    obstacle = tree_obstacle(target)
    if obstacle is not None:
        raise ValueError(
            f"{type(target).__name__} {obstacle}, so that it cannot verify a draft tree. Set draft_top_k=1 to verify chains."
        )


def _check_adapters(target: PreTrainedModel) -> None:
    """Raises `ValueError` for an active aLoRA adapter, because it counts from the end of a forward pass's inputs."""
    configs = getattr(target, "peft_config", None) or {}
    names = {name for name, config in configs.items() if getattr(config, "alora_invocation_tokens", None)}
    if not names:
        return
    layers = [module for module in target.modules() if hasattr(module, "base_layer")]  # PEFT's
    for layer in layers:
        active = names & set(layer.active_adapters)
        if active and not layer.disable_adapters:
            raise ValueError(
                f"The active adapter {sorted(active)[0]!r} is an aLoRA (alora_invocation_tokens), which PEFT applies to one "
                "token at a time, not to drafts. Generate without assistant_model, or with another adapter."
            )


def _check_prompts(target: PreTrainedModel) -> None:
    """Raises `ValueError` within the `generate` of a PEFT wrapper with a learnt prompt.

    With Transformers 5.24, PEFT 0.21 puts the prompt before the new token of every step that has a cache and omits a prefix.
    There is therefore no correct text to compare with.
    """
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", target)  # PEFT's own, while it generates
    if wrapper is not target and (prompt := active_prompt(wrapper)) is not None:
        raise ValueError(
            f"The active adapter is a learnt prompt ({prompt}), which PEFT does not combine with a KV cache, but drafts need "
            "one. Generate without assistant_model and with use_cache=False, or switch it off (disable_adapter())."
        )


def _check_cross_attention(target: PreTrainedModel, cache: Cache, model_kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` if layers of the target attend to an image or an encoder, whose keys do not belong to tokens."""
    layers = getattr(target.config.get_text_config(), "cross_attention_layers", None) or []
    names = _CROSS_ATTENTION_INPUTS | ({"pixel_values"} if layers else set())
    given = sorted(name for name in names if model_kwargs.get(name) is not None)
    filled = [index for index in layers if index < len(cache.layers) and cache.layers[index].get_seq_length() > 0]
    if given or filled:
        raise ValueError(
            f"{type(target).__name__} attends to {', '.join(given) or 'an image in the cache'} by cross-attention, with which "
            "drafts cannot be verified. Generate without assistant_model, or without that input."
        )


def _holds_tensors(value: Any) -> bool:
    """Whether a value contains tensors. Images are tensors, or dicts of encodings by kind."""
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(item, torch.Tensor | dict) for item in values)


__all__ = ["check_call", "check_ids"]
