"""What differs between the Transformers releases that the package runs on (5.17 to 5.x), found by inspection."""

from dataclasses import fields
from typing import Any

from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput


# The KV cache's name in `generate`, `prepare_inputs_for_generation`, every model's forward and every output: 5.24 renamed
# `past_key_values` to `cache` in all of them at once, and warns of the old name.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"


def cache_kwarg(cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument under which a target's forward or `generate` takes it."""
    return {CACHE_NAME: cache}


def cache_of(outputs: Any) -> Any:
    """The KV cache in the outputs of a forward or of `generate`, or in `generate`'s `model_kwargs`; None if none is there."""
    return outputs.get(CACHE_NAME)


def default_generation_settings() -> dict[str, Any]:
    """What `generate` fills in where neither the call nor the target's generation config says anything."""
    filled_in = getattr(GenerationConfig, "_get_default_generation_params", None)
    return GenerationConfig().to_dict() if filled_in is None else filled_in()


__all__ = ["CACHE_NAME", "cache_kwarg", "cache_of", "default_generation_settings"]
