"""Writes a CORAL drafter as a serving engine's checkpoint, checked against its schema. Writes all of it or nothing."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..drafter.configuration_coral import FC_NORMS, FEATURE_LAYER_LAST, CoralDraftConfig
from ..drafter.target_adapter import TargetAdapter
from ..drafter.weight_files import follow_umask
from .checkpoint_files import CONFIG_FILE, HOT_TOKENS_FILE, check_new_folder, staged_folder
from .eagle_config import CORAL_KEY, CORAL_SETTINGS, default_feature_layers, write_rope
from .schema import LAYER, check_export, load_schemas
from .serving import export_notes, serve_command


ENGINES = ("vllm", "sglang", "speculators", "eagle")


@dataclass
class EngineExport:
    """The result of an export.

    Args:
        folder (`Path`): the engine's checkpoint.
        command (`str`): the command that serves it.
        notes (`list[str]`): differences in the engine, and settings that were left out.
    """

    folder: Path
    command: str
    notes: list[str] = field(default_factory=list)


def export_drafter(
    drafter: Any,
    engine: str,
    folder: str | os.PathLike,
    target: Any = None,
    target_name: str | None = None,
) -> EngineExport:
    """Writes the folder that an engine loads for a drafter.

    Args:
        drafter ([`CoralDraftModel`])
        engine (`str`): one of `ENGINES`; `"eagle"` is the layout of EAGLE's own code.
        folder (`str` or `os.PathLike`): a new or empty folder.
        target (`PreTrainedModel`, *optional*): needed by `"eagle"` for the `eagle3` shape, whose checkpoints contain an
            LM head. For the `eagle` shape, it provides the embedding's scale if the drafter's config lacks it; a target on
            the meta device is enough for that.
        target_name (`str`, *optional*): path or Hub id of the target to serve; defaults to the one in the config.

    Returns:
        [`EngineExport`]

    Raises:
        ValueError: if the engine is unknown or cannot express the drafter, or the folder is not empty. Nothing is written.
    """
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}; choose one of {list(ENGINES)}.")
    check_new_folder(folder)
    config = drafter.config
    problems = _obstacles(config, engine, target)
    if engine != "sglang" and _is_permuted(drafter.draft_head, config.vocab_size):
        problems.append(
            "its own head scores the whole vocabulary in another order, ids are read for a part of it only"
        )
    if problems:
        raise ValueError(f"{engine} cannot express this drafter: {'; '.join(problems)}.")
    target_name = target_name or config.target_name_or_path
    if engine == "speculators" and target_name is None:
        raise ValueError("A speculators folder names its target, and this drafter records none: name it (--target).")
    tensors = _tensors(drafter, engine, target)
    written = _config(config, engine, str(drafter.dtype).removeprefix("torch."), target_name)
    check_export(engine, config, written, tensors)
    hot_tokens = None
    if engine == "sglang" and config.shape == "eagle" and drafter.shortlist is not None:
        hot_tokens = drafter.shortlist.token_ids.tolist()
    with staged_folder(folder) as scratch:
        (scratch / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        follow_umask(scratch)
        if hot_tokens is not None:
            torch.save(hot_tokens, scratch / HOT_TOKENS_FILE)
    folder = Path(folder)
    command = serve_command(config, engine, folder, target_name or "TARGET", hot_tokens is not None)
    return EngineExport(folder, command, export_notes(config, engine, hot_tokens is not None))


def _obstacles(config: CoralDraftConfig, engine: str, target: Any) -> list[str]:
    """All properties of a drafter that an engine does not support."""
    problems = []
    layers, eagle3 = config.target_feature_layers, config.shape == "eagle3"
    if config.shape not in load_schemas()["engines"][engine]:
        return [f"it has no {config.shape} shape; use --to vllm or sglang"]
    if engine != "eagle":
        if config.hidden_act != "silu":
            problems.append(f"hidden_act={config.hidden_act!r}, only silu is served")
        if config.attention_bias:
            problems.append("attention_bias=True, q/k/v biases are not served for Llama-shaped drafters")
    if not eagle3:
        if engine == "vllm" and config.fc_bias:
            problems.append("fc_bias=True, its fc has no bias")
        return problems + _scaled_embedding(config, target)
    single = layers == [FEATURE_LAYER_LAST]
    if single and engine != "vllm":
        problems.append("one feature, the last layer's normed state, is served by vLLM alone; use --to vllm")
    elif not single and FEATURE_LAYER_LAST in layers:
        problems.append(
            f"target_feature_layers={layers}: the normed last state (-1) cannot be captured next to others: "
            + _features_read(config, engine)
        )
    elif not single and len(layers) == 1:
        problems.append(f"target_feature_layers={layers}: one feature must be the last layer's, -1")
    elif not single and layers != sorted(set(layers)):
        problems.append(f"target_feature_layers={layers}: layers are captured in ascending order, each once")
    elif engine == "sglang" and 0 in layers:
        problems.append(f"target_feature_layers={layers}: the input of layer 0 cannot be captured")
    elif engine == "eagle" and layers != _default_layers(config):
        problems.append(f"target_feature_layers={layers}: it reads {_default_layers(config)} of this target")
    if config.norm_before_residual and engine in ("sglang", "eagle"):
        problems.append("norm_before_residual=True, its residual starts from the raw feature")
    if config.norm_output and engine == "eagle":
        problems.append("norm_output=True, it feeds the state before the norm back; use --to vllm or sglang")
    if engine == "eagle":
        raw = "its fc reads features without a norm; use --to vllm, sglang or speculators"
        problems += [f"{name}=True, {raw}" for name in FC_NORMS if getattr(config, name)]
    if engine == "eagle" and config.head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim={config.head_dim}, it takes hidden_size / num_attention_heads")
    return problems


def _features_read(config: CoralDraftConfig, engine: str) -> str:
    """Describes the target states that an engine passes to a drafter that reads several."""
    if engine == "eagle":
        return f"it reads {_default_layers(config)} of this target"
    if engine == "sglang":
        return "it reads the inputs of layers, and the last layer's output is the input of none"
    return "vLLM reads residual streams, that of the last layer before the final norm, and has no norm for one alone"


def _scaled_embedding(config: CoralDraftConfig, target: Any) -> list[str]:
    """Why engines would pass an `eagle` drafter different embeddings from those in training; empty if they would not.

    Engines share the unscaled matrix with the drafter, which is wrong for an `fc` that was trained on scaled embeddings. The
    `eagle3` shape norms the embedding, so the scale does not matter.
    """
    scale, kind = config.target_embedding_scale, config.target_model_type
    if scale is None and target is not None:
        adapter = TargetAdapter(target)
        adapter.check_drafter(config)
        scale = adapter.embedding_scale
    elif scale is None and kind in CONFIG_MAPPING:
        # A drafter older than the setting: its target's type tells whether there is a scale, but not always its value.
        try:
            adapter = TargetAdapter(meta_target(CONFIG_MAPPING[kind]()))
        except ValueError:  # the type of a part of a model
            return []
        scale = adapter.embedding_scale
        if scale == 1.0 and hasattr(adapter.text_config, "embedding_multiplier"):
            return [
                f"{kind} may scale its embeddings, and its config does not say: give the target's path or id (--target)"
            ]
    if scale in (None, 1.0):
        return []
    return [f"{kind} scales its embeddings (by {scale:g}), which the drafter's fc would not see"]


def meta_target(config: Any) -> Any:
    """A target without weights, made from a config, for its sizes and scales.

    Raises:
        ValueError: if Transformers has no causal LM for it.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _is_permuted(own_head: Any, vocab_size: int) -> bool:
    """Whether the drafter's own head scores all ids in a different order."""
    if own_head is None or own_head.token_ids.numel() != vocab_size:
        return False
    return not torch.equal(own_head.token_ids.cpu(), torch.arange(vocab_size))


def _default_layers(config: CoralDraftConfig) -> list[int] | None:
    depth = config.target_num_hidden_layers
    return None if depth is None else default_feature_layers(depth)


def _tensors(drafter: Any, engine: str, target: Any) -> dict[str, torch.Tensor]:
    """The drafter's weights under the engine's names."""
    config = drafter.config
    prefix = load_schemas()["engines"][engine][config.shape]["layer"]
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        if name.startswith(("router.", "shortlist.", "low_rank.", "draft_head.")):
            continue
        name = prefix + name.removeprefix(LAYER) if name.startswith(f"{LAYER}.") else name
        # cloned, because tensors in a safetensors file must not share storage
        tensors[name] = tensor.detach().cpu().clone().contiguous()
    if engine == "sglang" and config.shape == "eagle" and not config.fc_bias:
        # SGLang's fc always has a bias, which is random unless the file contains one.
        tensors["fc.bias"] = torch.zeros(config.hidden_size, dtype=drafter.dtype)
    own = drafter.draft_head
    if own is not None:
        rows = torch.arange(own.token_ids.numel())
        ids = own.token_ids.cpu()
        tensors["lm_head.weight"] = own.weight.detach().cpu().clone()
        if ids.numel() != config.vocab_size or not torch.equal(ids, rows):
            tensors["d2t"] = ids - rows
            tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    elif engine == "eagle" and config.shape == "eagle3":
        if target is None:
            raise ValueError(
                "EAGLE-3's own checkpoints contain an LM head, but this drafter uses its target's: pass the target (--target)."
            )
        adapter = TargetAdapter(target)
        adapter.check_drafter(config)
        tensors["lm_head.weight"] = adapter.head.weight.detach().cpu().to(drafter.dtype).clone()
    return tensors


def _config(config: CoralDraftConfig, engine: str, dtype: str, target_name: str | None) -> dict[str, Any]:
    """The engine's `config.json`."""
    schema = load_schemas()["engines"][engine][config.shape]
    llama = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        **write_rope(config),
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    kept = {CORAL_KEY: {name: getattr(config, name) for name in CORAL_SETTINGS}}
    architectures = {"architectures": list(schema["config"]["architectures"]["const"])}
    if config.shape == "eagle":
        # EAGLE's code interprets a missing `bias` as an fc with a bias; vLLM uses the key for the attention.
        biases = {"bias": config.fc_bias, "qkv_bias": config.attention_bias} if engine == "eagle" else {}
        return {**architectures, **llama, **biases, **kept}
    layers, head = config.target_feature_layers, {"draft_vocab_size": config.draft_vocab_size}
    norms = {"norm_before_residual": config.norm_before_residual, "norm_output": config.norm_output}
    norms |= {name: True for name in FC_NORMS if getattr(config, name)}
    if engine == "speculators":
        return {
            **architectures,
            "speculators_model_type": "eagle3",
            "speculators_config": _speculators_config(config, target_name),
            # vLLM counts the features by this key only, and passes on the layer's config
            "transformer_layer_config": {**llama, "num_aux_hidden_states": len(layers)},
            **norms,
            "eagle_aux_hidden_state_layer_ids": layers,
            "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
            "tie_word_embeddings": False,
            "dtype": dtype,
            **kept,
        }
    if engine == "eagle":
        return {**architectures, **llama, "draft_vocab_size": config.draft_vocab_size or config.vocab_size, **kept}
    features: dict[str, Any] = {"num_aux_hidden_states": len(layers)}
    if layers == [FEATURE_LAYER_LAST]:
        features["eagle_config"] = {"use_aux_hidden_state": False}
    elif engine == "vllm":
        features["eagle_aux_hidden_state_layer_ids"] = layers
    elif layers != _default_layers(config):
        # SGLang adds one, because it names a layer's output, and CORAL names the input of the next layer.
        features["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in layers]}
    return {**architectures, **llama, **norms, **features, **head, **kept}


def _speculators_config(config: CoralDraftConfig, target_name: str | None) -> dict[str, Any]:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.target_model_type)
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.draft_depth,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [proposal],
        "verifier": {"name_or_path": target_name, "architectures": [architecture] if architecture else []},
    }


__all__ = ["ENGINES", "EngineExport", "export_drafter", "meta_target"]
