"""What is refused in a drafter's settings: values of another type, out of range, or at odds with each other."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


SHAPES = ("eagle", "eagle3")
GROUPINGS = ("consecutive", "clustered")
# Heads that drafting can use; None: all that a drafter has
DRAFT_HEADS = ("full", "shortlist", "router", "both", "low_rank", "context")
LOW_RANK_SETTINGS = ("low_rank_size", "low_rank_candidates")
_PARTS = {
    "shortlist": ("shortlist_size",),
    "router": ("router_groups",),
    "both": ("router_groups", "shortlist_size"),
    "low_rank": ("low_rank_size",),
}  # of each head, the settings that give a drafter its parts
FEATURE_LAYER_LAST = -1
# settings of the layers between several target features and `fc`, named as in the engines' configs; one at most
FC_NORMS = ("norm_before_fc", "fc_norm")
# path probabilities at which `draft_calibration` gives the observed acceptance, with straight lines between them
CALIBRATION_KNOTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def check_known(config: Any, unknown: list[str], model_type: Any) -> None:
    """Raises `ValueError` for settings that a drafter does not have, and for the config of another model."""
    listed = f"{unknown[:3]}" + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    if model_type not in (None, type(config).model_type):
        others = f" with setting(s) {listed} that a drafter does not have" if unknown else ""
        raise ValueError(
            f"model_type={str(model_type)[:80]!r}{others}: the config of another model, not of a CORAL drafter "
            f"({type(config).model_type!r}). Load a model with AutoModelForCausalLM; an EAGLE checkpoint becomes a drafter "
            "with CoralDraftModel.from_eagle or `coral-hf convert --from eagle`."
        )
    if unknown:
        names = [field.name for field in dataclasses.fields(config)]
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "CoralDraftConfig's documentation lists the settings."
        raise ValueError(f"Unknown setting(s) {listed} for CoralDraftConfig. {hint}")


def check_types(config: Any, declared: dict[str, Any]) -> None:
    """A `config.json` may come from anywhere: every field is of its declared type before anything is computed."""
    for name, kind in declared.items():
        value = getattr(config, name)
        if value is None and getattr(type(config), name) is None:  # left to its default
            continue
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if not any(_is_of(value, one) for one in kinds):
            written = str(kind).removeprefix("<class '").removesuffix("'>").replace("NoneType", "None")
            raise ValueError(f"{name}={str(value)[:80]!r} must be of type {written}.")


def check_dtype(dtype: Any) -> None:
    """Raises `ValueError` for what is neither a floating-point dtype, nor the name of one, nor None."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"dtype={str(dtype)[:80]!r} is not a floating-point dtype; write 'float32' or 'bfloat16', for example."
        )


def check_settings(config: Any) -> None:
    """Raises `ValueError` for settings of a drafter that are out of range or contradict each other."""
    if config.shape not in SHAPES:
        raise ValueError(f"shape={config.shape!r} is unknown; choose one of {list(SHAPES)}.")
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.num_hidden_layers != 1:
        raise ValueError(f"num_hidden_layers={config.num_hidden_layers}: a CORAL drafter has exactly 1 layer.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}."
        )
    if config.target_embedding_scale is not None and config.target_embedding_scale <= 0:
        raise ValueError(
            f"target_embedding_scale={config.target_embedding_scale} must be positive; 1.0 means no scaling."
        )
    rope = config.rope_parameters
    theta, kind = rope.get("rope_theta", 10000.0), rope.get("rope_type", "default")
    if not (_is_of(theta, float) and theta > 0 and kind in ("default", *ROPE_INIT_FUNCTIONS)):
        raise ValueError(
            f"rope_parameters={rope} must contain a positive number as rope_theta and one of "
            f"{['default', *ROPE_INIT_FUNCTIONS]} as rope_type."
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is unknown to Transformers; 'silu' is the usual one.")
    if config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} must be even: RoPE rotates pairs.")
    layers, depth = config.target_feature_layers, config.target_num_hidden_layers
    if not layers or min(layers) < FEATURE_LAYER_LAST or (depth is not None and max(layers) >= depth):
        raise ValueError(
            f"target_feature_layers={layers}: list at least one of -1 (after the final norm) and layers from 0 on"
            + ("." if depth is None else f"; the target has {depth} layers.")
        )
    if config.shape == "eagle" and config.target_feature_layers != [FEATURE_LAYER_LAST]:
        raise ValueError(
            f"shape='eagle' reads one feature, target_feature_layers=[-1]; got {config.target_feature_layers}. "
            "Use shape='eagle3' for several."
        )
    if config.shape == "eagle" and config.norm_before_residual:
        raise ValueError("norm_before_residual=True exists for shape='eagle3' only; set it to False.")
    if config.shape == "eagle3" and config.fc_bias:
        raise ValueError("fc_bias=True exists for shape='eagle' only; set it to False.")
    norms = [name for name in FC_NORMS if getattr(config, name)]
    if len(norms) > 1:
        raise ValueError(
            "norm_before_fc=True and fc_norm=True: features are normed once; set one of the two to False."
        )
    if norms and (config.shape != "eagle3" or len(layers) == 1):
        raise ValueError(
            f"{norms[0]}=True norms several features before fc, which shape={config.shape!r} with "
            f"target_feature_layers={layers} does not have: set it to False, or list several layers with shape='eagle3'."
        )

    check_draft_sizes(config.draft_depth, config.draft_top_k, config.draft_total_tokens)
    for row in config.draft_calibration or ():
        if (
            not (isinstance(row, list | tuple) and all(_is_of(value, float) for value in row))
            or len(row) != len(CALIBRATION_KNOTS)
            or list(row) != sorted(row)
            or row[0] < 0
            or row[-1] > 1
        ):
            raise ValueError(
                f"draft_calibration contains {row}: a row is {len(CALIBRATION_KNOTS)} numbers from 0 to 1 that never "
                "fall. Fit it with `coral-hf tune --save true`, or set it to null."
            )


def check_head(config: Any) -> None:
    """Raises `ValueError` for settings of a draft head that are out of range or contradict each other."""
    if config.router_grouping not in GROUPINGS:
        raise ValueError(f"router_grouping={config.router_grouping!r} is unknown; choose one of {list(GROUPINGS)}.")
    if config.router_groups and not 0 < config.router_active_groups <= config.router_groups:
        raise ValueError(
            f"router_active_groups={config.router_active_groups} must be between 1 and "
            f"router_groups={config.router_groups}."
        )
    if config.router_groups and config.router_hidden_size < 1:
        raise ValueError(
            f"router_hidden_size={config.router_hidden_size} must be at least 1; leave it out for half of hidden_size."
        )
    if not 0 <= config.shortlist_size < config.vocab_size:
        raise ValueError(
            f"shortlist_size={config.shortlist_size} must be between 0 (none) and vocab_size - 1 = "
            f"{config.vocab_size - 1}."
        )
    _check_low_rank(config)
    if config.draft_head not in (None, *DRAFT_HEADS):
        raise ValueError(f"draft_head={config.draft_head!r} is unknown; choose one of {list(DRAFT_HEADS)}, or null.")
    for name in _PARTS.get(config.draft_head, ()):
        if not getattr(config, name):
            raise ValueError(
                f"draft_head={config.draft_head!r} drafts with what {name}=0 leaves out: set {name}, or draft_head to null."
            )
    if config.draft_vocab_size is None:
        return
    if config.shape != "eagle3" or not 0 < config.draft_vocab_size <= config.vocab_size:
        raise ValueError(
            f"draft_vocab_size={config.draft_vocab_size} must be between 1 and vocab_size={config.vocab_size} and needs "
            f"shape='eagle3' (got {config.shape!r})."
        )
    if (
        config.router_groups
        or config.shortlist_size
        or config.low_rank_size
        or config.draft_head not in (None, "full")
    ):
        raise ValueError(
            f"draft_vocab_size={config.draft_vocab_size} gives the drafter a head of its own; all others choose rows of the "
            "target's: set router_groups, shortlist_size and low_rank_size to 0, and draft_head to null."
        )


def _check_low_rank(config: Any) -> None:
    rank, candidates = config.low_rank_size, config.low_rank_candidates
    if not 0 <= rank <= config.hidden_size:
        raise ValueError(
            f"low_rank_size={rank} must be between 0 (none) and hidden_size={config.hidden_size}, the rank of the whole head."
        )
    if not rank and candidates is not None:
        raise ValueError(
            f"low_rank_candidates={candidates} is about a low-rank head, and low_rank_size=0 leaves it out: set low_rank_size, or "
            "leave low_rank_candidates out."
        )
    if rank and not 0 < candidates <= config.vocab_size:
        raise ValueError(f"low_rank_candidates={candidates} must be between 1 and vocab_size={config.vocab_size}.")


def check_draft_sizes(depth: Any, top_k: Any, total: Any) -> None:
    """Raises `ValueError` for sizes of a draft that are not numbers of at least one, or that cannot be drafted.

    Args:
        depth, top_k, total: `draft_depth`, `draft_top_k` and `draft_total_tokens` (None: all that the others produce).
    """
    for name, value in (("draft_depth", depth), ("draft_top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    if total is None:
        return
    if not isinstance(total, int) or isinstance(total, bool) or total < 2:
        raise ValueError(
            f"draft_total_tokens={total!r} must be an integer of at least 2 (the root and one draft), or None for all "
            "that draft_depth and draft_top_k produce."
        )
    most = most_draft_tokens(depth, top_k)
    if total > most:
        raise ValueError(
            f"draft_total_tokens={total} is more than draft_depth={depth} and draft_top_k={top_k} can produce ({most}, "
            f"the root included). Lower it to {most} or raise draft_depth or draft_top_k."
        )


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:  # what a tensor's size can be
        return type(value) is int and abs(value) < 2**31
    return isinstance(value, kind)


def most_draft_tokens(depth: int, top_k: int) -> int:
    """Nodes that a draft can have: root, one level of `top_k`, then `top_k`^2 per level; a chain's with `top_k` of 1."""
    return 1 + top_k + (depth - 1) * top_k**2


def group_size(vocab_size: int, num_groups: int) -> int:
    """Ids per group when a vocabulary is spread over that many groups, rounded up.

    Raises:
        ValueError: if there is no group.
    """
    if num_groups < 1:
        raise ValueError(f"router_groups={num_groups} must be at least 1 for a router (0, in a config: none).")
    return -(-vocab_size // num_groups)


def group_count(vocab_size: int, num_groups: int) -> int:
    """How many of `num_groups` groups of `group_size` ids hold any: fewer where rounding up used the ids up before."""
    return -(-vocab_size // group_size(vocab_size, num_groups))


__all__ = [
    "CALIBRATION_KNOTS",
    "DRAFT_HEADS",
    "FC_NORMS",
    "FEATURE_LAYER_LAST",
    "LOW_RANK_SETTINGS",
    "check_draft_sizes",
    "check_dtype",
    "check_head",
    "check_known",
    "check_settings",
    "check_types",
    "group_count",
    "group_size",
    "most_draft_tokens",
]
