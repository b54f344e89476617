"""Differences between the supported Transformers releases (5.17 to 5.x), found by inspection."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import transformers
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput


try:  # 5.24 keeps the hidden states that `output_hidden_states` lists; older releases keep all
    from transformers.utils.output_capturing import selected_hidden_states as _selection
except ImportError:
    _selection = None


# The KV cache's name in `generate`, `prepare_inputs_for_generation`, every model's forward and every output: 5.24 renamed
# `past_key_values` to `cache` in all of them at once, and warns of the old name.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"


def cache_kwarg(cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument of a target's forward or `generate`."""
    return {CACHE_NAME: cache}


def cache_of(outputs: Any) -> Any:
    """The KV cache in the outputs of a forward pass or of `generate`, or in `generate`'s `model_kwargs`; None if missing."""
    return outputs.get(CACHE_NAME)


def compiles_by_itself(target: Any, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
    """Whether plain `generate` would compile the target's forward pass for these arguments. It logs if it was asked to but cannot."""
    criteria = getattr(target, "_valid_auto_compile_criteria", None)
    return criteria is not None and bool(criteria(model_kwargs, generation_config))


def default_generation_settings() -> dict[str, Any]:
    """The defaults of `generate` for settings that neither the call nor the target's generation config sets."""
    filled_in = getattr(GenerationConfig, "_get_default_generation_params", None)
    return GenerationConfig().to_dict() if filled_in is None else filled_in()


def hidden_states_to_ask(target: Any, layers: Iterable[int]) -> list[int] | bool:
    """The value for `output_hidden_states` with which a forward pass keeps the states of these layers and, if possible, no others.

    Args:
        target (`PreTrainedModel`): a causal LM, or its decoder.
        layers (`Iterable[int]`): indices into the tuple of all hidden states; they may be negative.

    Returns:
        `list[int]` of indices from the front, or `True` (all states) if this Transformers release or this target cannot
        select.
    """
    decoder = target.get_decoder() if hasattr(target, "get_decoder") else target
    recorded = (getattr(decoder, "_can_record_outputs", None) or {}).get("hidden_states")
    layer_class = getattr(recorded, "target_class", recorded)
    config = decoder.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    if _selection is None or not isinstance(layer_class, type) or count is None:
        return True
    # States are counted as they are recorded. The indices would shift if their number differed from that of the layers: for
    # shared layers, layers in a loop (Dory), other blocks of the same class, or without a state of the embedding.
    found = sum(isinstance(module, layer_class) for module in decoder.modules())
    loops = any("loop" in name and isinstance(value, int) and value > 1 for name, value in vars(config).items())
    if loops or found != count or not getattr(recorded, "capture_initial_hidden_state", True):
        return True
    return sorted({layer % (count + 1) for layer in layers})


def checkpointing_argument() -> str:
    """The training argument that recomputes activations in the backward pass. 5.24 renamed it and warns about the old name."""
    from transformers import TrainingArguments  # imports all of accelerate

    names = {field.name for field in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def enable_checkpointing(model: Any) -> None:
    """Enables activation checkpointing with the method that is not deprecated."""
    getattr(model, f"{checkpointing_argument()}_enable")()


def openai_server(model: Any, tokenizer: Any, name: str) -> Callable[..., Any]:
    """Transformers' OpenAI-compatible server (`transformers serve`) for a loaded model.

    Args:
        model (`PreTrainedModel`): its `generate` answers the requests.
        tokenizer (`PreTrainedTokenizerBase`)
        name (`str`): the model's name in requests.

    Returns:
        `Callable`: takes `host`, `port` and other settings of the server, and serves until it is interrupted. With
        `non_blocking=True`, it immediately returns the server object, whose `kill_server()` stops it.

    Raises:
        ValueError: if this Transformers release has no such server, or a different one.
    """
    missing = []
    try:
        from transformers.cli import serve
        from transformers.cli.serving import model_manager
    except ImportError as error:
        missing.append(str(error))
    else:
        taken = inspect.signature(serve.Serve.__init__).parameters
        missing += [f"Serve({key})" for key in ("force_model", "host", "port", "non_blocking") if key not in taken]
        manager = getattr(model_manager, "ModelManager", None)
        loaders = ("_load_model", "_load_processor")
        missing += [f"ModelManager.{method}" for method in loaders if not callable(getattr(manager, method, None))]
    if missing:
        raise ValueError(
            f"The server of this Transformers release is different (missing: {', '.join(missing)}): install a release that this "
            "version of coral-hf was tested with (see its changelog), or serve with an engine (`coral-hf convert --to vllm`)."
        )

    class LoadedModel(manager):  # type: ignore[misc, valid-type]
        """The server's model manager for a single loaded model."""

        def _load_model(self, *_: Any, **__: Any) -> Any:
            return model

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return tokenizer

    def run(**settings: Any) -> Any:
        # the server imports its manager by name when it is created
        model_manager.ModelManager = LoadedModel
        try:
            return serve.Serve(force_model=name, **settings)
        finally:
            model_manager.ModelManager = manager

    return run


def release_obstacle(setting: str) -> str | None:
    """Why `generate` cannot draft as a field of its generation config asks; None if this Transformers release knows the field."""
    if hasattr(GenerationConfig(), setting):
        return None
    return f"this Transformers release ({transformers.__version__}) has no {setting}; install a newer one"


def mtp_obstacle(target: Any) -> str | None:
    """Why a target cannot draft with MTP layers of its own (`use_mtp`); None if its config counts some."""
    if getattr(target.config.get_text_config(), "num_mtp_layers", None):
        return None
    return f"{type(target).__name__} has no layers for multi-token prediction (num_mtp_layers in its config)"


def dflash_obstacle(target: Any, assistant: Any) -> str | None:
    """Why a model cannot draft blocks for a target (`speculation_type="dflash"`); None if both fit."""
    config, text = assistant.config, target.config.get_text_config()
    missing = [name for name in ("block_size", "mask_token_id", "target_layer_ids") if not hasattr(config, name)]
    if missing:
        return (
            f"the assistant is a {type(assistant).__name__}, not a DFlash drafter ({', '.join(missing)} missing from its config); "
            "name one with --assistant"
        )
    # the target's own embedding and head serve the drafter, and its layers give the features
    sizes = {
        "hidden_size": (config.hidden_size, text.hidden_size, config.hidden_size == text.hidden_size),
        "mask_token_id": (config.mask_token_id, text.vocab_size, config.mask_token_id < text.vocab_size),
        "target_layer_ids": (
            config.target_layer_ids,
            text.num_hidden_layers,
            max(config.target_layer_ids) < text.num_hidden_layers,
        ),
    }
    for name, (drafter, size, fits) in sizes.items():
        if not fits:
            owner = {"mask_token_id": "vocab_size", "target_layer_ids": "num_hidden_layers"}.get(name, name)
            return f"the assistant's {name}={drafter} does not fit a target of {owner}={size}; name the drafter of this target"
    return None


__all__ = [
    "CACHE_NAME",
    "cache_kwarg",
    "cache_of",
    "checkpointing_argument",
    "compiles_by_itself",
    "default_generation_settings",
    "dflash_obstacle",
    "enable_checkpointing",
    "hidden_states_to_ask",
    "mtp_obstacle",
    "openai_server",
    "release_obstacle",
]
