"""Converts the `config.json` of EAGLE-family checkpoints to CoralDraftConfig settings, and back."""

from typing import Any

from ..drafter.configuration_coral import FEATURE_LAYER_LAST, CoralDraftConfig
from .schema import check_config, load_schemas


# The key under which an exported folder keeps settings that no engine reads, so that they can be imported again.
CORAL_KEY = "coral_config"
CORAL_SETTINGS = (
    "target_name_or_path",
    "target_revision",
    "target_model_type",
    "target_num_hidden_layers",
    "target_vocab_hash",
    "target_embedding_scale",
    "chat_template_kwargs",
    "target_feature_layers",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "draft_depth",
    "draft_top_k",
    "draft_total_tokens",
    "draft_cost_aware",
    "draft_lookup",
    "draft_calibration",
)
# If true, each of these changes the forward pass in a way that CoralDraftModel does not support.
UNSUPPORTED = {
    "add_para_norm": "norms on the inputs of fc",
    "mlp_bias": "biases in the MLP",
    "quantization_config": "quantised weights",
    "parallel_drafting": "parallel drafting",
    "attn_logit_softcapping": "capped attention scores",
}
# Types with Llama's tensors but a different forward pass: norms that add one to their weights, scaled residuals.
OTHER_FORWARDS = ("gemma", "granite", "minicpm")
# Keys for a norm before fc, at the top level or under `eagle_config`. The last is an older name of the second.
_NORM_TYPES = {"norm_before_fc": "boolean", "fc_norm": "boolean", "use_aux_norm": "boolean"}
_TYPES = {
    "architectures": "array",
    "transformer_layer_config": "object",
    "eagle_config": "object",
    "eagle_aux_hidden_state_layer_ids": "array",
    "draft_vocab_size": "integer",
    CORAL_KEY: "object",
    **_NORM_TYPES,
}
_DIMENSIONS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


def default_feature_layers(num_hidden_layers: int) -> list[int]:
    """The three layers that EAGLE-3 reads by default, as residual streams before these layers."""
    return [2, num_hidden_layers // 2, num_hidden_layers - 3]


def check_integers(values: Any, name: str) -> None:
    """Raises `ValueError` unless `values` is a list of integers."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name}: expected a list of integers, found {values!r}.")


def layer_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint's config that describes its decoder layer (speculators nests it)."""
    nested = raw.get("transformer_layer_config")
    return nested if isinstance(nested, dict) else raw


def check_supported(raw: dict[str, Any]) -> None:
    """Raises `ValueError` for values of a wrong type, and for settings that a CORAL drafter does not support."""
    types = {key: rule for key, rule in load_schemas()["llama_config"].items() if not isinstance(rule, dict)}
    parts = ((raw, {**types, **_TYPES}), (layer_config(raw), types), (raw.get("eagle_config") or {}, _NORM_TYPES))
    for part, rules in parts:  # the first part determines whether the last is an object
        given = {key: rule for key, rule in rules.items() if part.get(key) is not None}
        check_config(part, given, "config.json is malformed")
    if raw.get("model_type") == "coral":
        raise ValueError(
            "model_type='coral' in config.json: this is a CORAL drafter already. Load it with AutoModel.from_pretrained."
        )
    layer, eagle = layer_config(raw), raw.get("eagle_config") or {}
    problems = [
        f"{key} ({reason})"
        for key, reason in UNSUPPORTED.items()
        if any(source.get(key) for source in (raw, layer, eagle))
    ]
    for key, expected in (
        ("num_hidden_layers", 1),
        ("target_hidden_size", layer.get("hidden_size")),
        ("speculators_model_type", "eagle3"),
    ):
        value = layer.get(key, raw.get(key))
        if value is not None and value != expected:
            problems.append(f"{key}: expected {expected!r}, found {value!r}")
    if (kind := str(layer.get("model_type"))).startswith(OTHER_FORWARDS):
        problems.append(f"model_type {kind!r} (its layer differs from Llama's)")
    if problems:
        raise ValueError(
            f"A CORAL drafter cannot represent this checkpoint{named_as(raw)}: {'; '.join(problems)}. Convert an EAGLE-1, EAGLE-2, "
            "HASS or EAGLE-3 drafter with one Llama-shaped layer."
        )


def named_as(raw: dict[str, Any]) -> str:
    """The architecture in a checkpoint's config, as a hint in messages, because the same tensors have many class names."""
    names = raw.get("architectures")
    return f" (architectures: {', '.join(map(str, names))})" if names else ""


def ignored_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint that change its forward pass for long texts. A CORAL drafter ignores them."""
    layer = layer_config(raw)
    kinds = layer.get("layer_types")
    window = layer.get("sliding_window")
    if not window or layer.get("use_sliding_window") is False or (kinds and "sliding_attention" not in kinds):
        return {}
    return {"sliding_window": window}


def read_rope(layer: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings from new (`rope_parameters`) or old (`rope_theta`, `rope_scaling`) keys.

    Raises:
        ValueError: if both exist and disagree, or if only a part of each head is rotated.
    """
    new, theta = layer.get("rope_parameters"), layer.get("rope_theta")
    scaling = dict(layer.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    old = {"rope_type": "default", **scaling}
    if theta is not None or "rope_theta" not in old:
        old["rope_theta"] = float(10000.0 if theta is None else theta)
    rope = {"rope_type": "default", "rope_theta": old["rope_theta"], **new} if new else old
    if new:
        given = {key: old[key] for key in ("rope_theta",) if theta is not None} | (old if scaling else {})
        differing = sorted(key for key, value in given.items() if rope.get(key) != value)
        if differing:
            raise ValueError(
                f"config.json has rope_parameters={new} and the older rope_theta={theta}, rope_scaling={scaling}, which "
                "disagree: delete those that the checkpoint was not trained with."
            )
    partial = rope.pop("partial_rotary_factor", layer.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor={partial}: a CORAL drafter rotates whole heads and cannot represent it."
        )
    return {**rope, "rope_theta": float(rope["rope_theta"])}


def write_rope(config: CoralDraftConfig) -> dict[str, Any]:
    """RoPE settings under new and old keys, because engines differ in which they read."""
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    default = scaling.get("rope_type", "default") == "default"
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if default else scaling,
        "rope_parameters": rope,
    }


def read_feature_layers(raw: dict[str, Any], fc_features: int | None, num_hidden_layers: int) -> list[int]:
    """The target features that an EAGLE-3 checkpoint reads, as `CoralDraftConfig.target_feature_layers`.

    At the top level ids mean the residual stream before the listed layers (vLLM, speculators). Under `eagle_config`
    they mean the layers' outputs, which is one layer later (SpecForge, and SGLang, which adds one to them).

    Args:
        raw (`dict`): the checkpoint's config.
        fc_features (`int`, *optional*): number of input features of `fc`; None: no `fc`.
        num_hidden_layers (`int`): the target's depth.

    Raises:
        ValueError: if the config names no layers and their number is not three.
    """
    eagle = raw.get("eagle_config") or {}
    if fc_features is None and eagle.get("use_aux_hidden_state") is False:
        return [FEATURE_LAYER_LAST]
    inputs, outputs = raw.get("eagle_aux_hidden_state_layer_ids"), eagle.get("eagle_aux_hidden_state_layer_ids")
    for ids, shift in ((inputs, 0), (outputs, 1)):
        if ids:
            check_integers(ids, "eagle_aux_hidden_state_layer_ids")
            return [layer + shift for layer in ids]
    if fc_features in (None, 3):
        return default_feature_layers(num_hidden_layers)
    raise ValueError(
        f"fc takes {fc_features} target features, but the config does not name their layers "
        "(eagle_aux_hidden_state_layer_ids); pass target_feature_layers."
    )


def read_fc_norms(raw: dict[str, Any]) -> dict[str, bool]:
    """The settings of `CoralDraftConfig` for norms before `fc`.

    As in vLLM and SGLang, `norm_before_fc` under `eagle_config` takes precedence over the top level. `use_aux_norm` is SGLang's
    older name of `fc_norm`.
    """
    eagle = raw.get("eagle_config") or {}
    each = (source.get(key) for source in (raw, eagle) for key in ("fc_norm", "use_aux_norm"))
    return {
        "norm_before_fc": bool(eagle.get("norm_before_fc", raw.get("norm_before_fc"))),
        "fc_norm": any(bool(value) for value in each),
    }


def read_settings(
    raw: dict[str, Any], target: CoralDraftConfig, shape: str, fc_features: int | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """`CoralDraftConfig` settings of a checkpoint for a target.

    Args:
        raw (`dict`): the checkpoint's config.
        target ([`CoralDraftConfig`]): settings that follow from the target.
        shape (`str`): the layout of the tensors.
        fc_features (`int`, *optional*): number of target features that `fc` reads.
        overrides (`dict`): settings that replace those of the checkpoint.

    Raises:
        ValueError: if dimensions are missing or differ from the target's; the message lists all of them.
    """
    layer = layer_config(raw)
    missing = [name for name in _DIMENSIONS if not isinstance(layer.get(name), int)]
    if missing:
        raise ValueError(f"The checkpoint's config.json lacks {missing} (integers). Fetch it again, or add them.")
    differing = [
        f"{name}: expected {getattr(target, name)} (the target's), found {layer[name]}"
        for name in ("vocab_size", "hidden_size")
        if layer[name] != getattr(target, name)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint was made for another target: {'; '.join(differing)}. Load that one (--target)."
        )
    kept = {key: value for key, value in (raw.get(CORAL_KEY) or {}).items() if key in CORAL_SETTINGS} | overrides
    settings = {key: value for key, value in target.to_dict().items() if key in CORAL_SETTINGS} | {
        "shape": shape,
        **{name: layer[name] for name in _DIMENSIONS},
        "num_key_value_heads": layer.get("num_key_value_heads") or layer["num_attention_heads"],
        "head_dim": layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"],
        "hidden_act": layer.get("hidden_act") or "silu",
        "rms_norm_eps": layer.get("rms_norm_eps") or 1e-6,
        "max_position_embeddings": layer.get("max_position_embeddings") or target.max_position_embeddings,
        "initializer_range": layer.get("initializer_range") or 0.02,
        "rope_parameters": read_rope(layer),
        **read_fc_norms(raw),
    }
    if shape == "eagle":
        settings["target_feature_layers"] = [FEATURE_LAYER_LAST]
    else:
        # vLLM takes a speculators config without the key for a normed residual
        normed = raw.get("norm_before_residual", "speculators_model_type" in raw)
        settings |= {"norm_output": bool(raw.get("norm_output")), "norm_before_residual": bool(normed)}
        if "target_feature_layers" not in kept:
            depth: Any = target.target_num_hidden_layers
            settings["target_feature_layers"] = read_feature_layers(raw, fc_features, depth)
    return settings | kept


__all__ = [
    "CORAL_KEY",
    "CORAL_SETTINGS",
    "check_supported",
    "default_feature_layers",
    "ignored_settings",
    "layer_config",
    "named_as",
    "read_fc_norms",
    "read_rope",
    "read_settings",
    "write_rope",
]
