"""CoralDraftConfig: every setting of a CORAL drafter, its default and where it comes from."""

import copy
import dataclasses
import hashlib
import json
import math
import typing
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


SHAPES = ("eagle", "eagle3")
GROUPINGS = ("consecutive", "clustered")
FEATURE_LAYER_LAST = -1
# path probabilities at which `draft_calibration` gives the observed acceptance, with straight lines between them
CALIBRATION_KNOTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)

# What `PreTrainedConfig` itself accepts beside its declared fields (`Trainer` writes the tokenizer's special ids); every
# other unknown key is an error.
_BASE_KEYS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "tie_last_hidden_states",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class CoralDraftConfig(PreTrainedConfig):
    r"""Configuration of a [`CoralDraftModel`]: one decoder layer that drafts for one target model.

    Use [`CoralDraftConfig.from_target`] to derive every dimension from a target; the defaults below are Llama-2-7B's.

    Args:
        shape (`str`, defaults to `"eagle"`):
            Layer layout. `"eagle"`: the paper's (CORAL section 3, EAGLE-1): `fc` over embedding and feature, no input
            and no final norm. `"eagle3"`: EAGLE-3's normed layer. The default trained better on SmolLM2-135M: 23.8 %
            first-step accuracy against 20.0 % after 100k response tokens, each at its best learning rate tried
            (the scaled embedding of `draft_initialization` was tried in the first only). Trained for longer, over
            several feature layers, `"eagle3"` went further (the shipped drafter's card); the two were not compared
            at equal data.
        vocab_size (`int`, defaults to 32000):
            V, the target's vocabulary size (`generate` requires both to be equal).
        hidden_size (`int`, defaults to 4096):
            H, the width of the drafter: always the target's, whose embedding and LM head it uses.
        intermediate_size (`int`, defaults to 11008):
            Width of the MLP (the target's).
        num_attention_heads (`int`, defaults to 32), num_key_value_heads (`int`, *optional*), head_dim (`int`, *optional*):
            Attention geometry. [`~CoralDraftConfig.from_target`] takes the target's.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the gated MLP (the target's).
        rms_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the norms (the target's).
        max_position_embeddings (`int`, defaults to 4096):
            Longest context (the target's); positions past it are warned about by the target itself.
        rope_parameters (`dict`, *optional*):
            RoPE settings in Transformers' format (the target's full-attention ones).
        attention_bias (`bool`, defaults to `False`):
            Bias on q/k/v. False: what the serving engines load for every target family.
        fc_bias (`bool`, defaults to `False`):
            Bias of `fc` (`"eagle"` only). False: vLLM refuses one; some old EAGLE checkpoints have one.
        norm_output (`bool`, defaults to `True`):
            `"eagle3"` only: feed the output of `norm` (True, EAGLE-3.1's choice) or its input (False, EAGLE-3) back as
            the next step's feature.
        norm_before_residual (`bool`, defaults to `False`):
            `"eagle3"` only: the residual stream starts from the normed feature (True) or the raw one (False, the only
            form that SGLang serves).
        target_feature_layers (`list[int]`, *optional*, defaults to `[-1]`):
            Target features to read: -1 is the last hidden state after the final norm, i >= 0 the residual stream
            before layer i. More than one needs `shape="eagle3"` and gives it an `fc`.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of randomly initialised matrices (Llama's).
        target_name_or_path (`str`, *optional*), target_revision (`str`, *optional*), target_model_type (`str`, *optional*),
        target_num_hidden_layers (`int`, *optional*):
            Which model the drafter was trained for; type and depth are checked by `generate`.
        target_vocab_hash (`str`, *optional*):
            [`vocab_hash`] of the target's tokenizer, checked wherever a tokenizer is at hand.
        bos_token_id (`int`, *optional*), eos_token_id (`int` or `list[int]`, *optional*), pad_token_id (`int`, *optional*):
            The target's special ids, by which `pipeline` tells that both share a tokenizer.
        draft_depth (`int`, defaults to 5), draft_top_k (`int`, defaults to 1), draft_total_tokens (`int`, *optional*):
            Size of a draft: levels below the root, branches per node (1: a chain), nodes verified with the root. See
            `generation.settings.DraftSettings`, also for overriding them per call.
        draft_cost_aware (`bool`, defaults to `False`):
            Decide a draft's size anew at every step within that box, by measured costs (`generation.tuning`).
        draft_calibration (`list[list[float]]`, *optional*):
            One row per depth (the last holds for all below): observed acceptance at the path probabilities
            `CALIBRATION_KNOTS`, as `coral-hf tune` fits it. None: drafted probabilities are taken as they are.
        router_groups (`int`, defaults to 0):
            G, groups of the LM-head router (CORAL section 3.2); 0: no router.
        router_grouping (`str`, defaults to `"consecutive"`):
            `"consecutive"`: groups of consecutive ids, views of the target's own head (the paper's). `"clustered"`
            (ours): groups of similar rows of the head, computed from one copy of it in the router's order.
        router_active_groups (`int`, *optional*):
            Groups computed per drafting step; defaults to a sixteenth of `router_groups`.
        router_hidden_size (`int`, *optional*):
            Width of the router's MLP (ours); defaults to half of `hidden_size`.
        shortlist_size (`int`, defaults to 0):
            Ids of the frequency shortlist that drafting is limited to; with a router they are active besides its
            groups. 0: no shortlist.
        draft_vocab_size (`int`, *optional*):
            `"eagle3"` only: rows of an LM head of the drafter's own (EAGLE-3 section 3: a reduced vocabulary), which
            replaces the target's when drafting. None: the target's head.
    """

    model_type = "coral"

    shape: str = "eagle"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    attention_bias: bool = False
    fc_bias: bool = False
    norm_output: bool = True
    norm_before_residual: bool = False
    target_feature_layers: list[int] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    target_name_or_path: str | None = None
    target_revision: str | None = None
    target_model_type: str | None = None
    target_num_hidden_layers: int | None = None
    target_vocab_hash: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    draft_depth: int = 5
    draft_top_k: int = 1
    draft_total_tokens: int | None = None
    draft_cost_aware: bool = False
    draft_calibration: list | None = None
    router_groups: int = 0
    router_grouping: str = "consecutive"
    router_active_groups: int | None = None
    router_hidden_size: int | None = None
    shortlist_size: int = 0
    draft_vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        unknown = sorted(key for key in kwargs if key not in _BASE_KEYS)
        if unknown:
            known = ", ".join(sorted(field.name for field in dataclasses.fields(CoralDraftConfig)))
            raise ValueError(f"Unknown setting(s) {unknown} for CoralDraftConfig. Known settings: {known}.")
        self._check_types()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_feature_layers is None:
            self.target_feature_layers = [FEATURE_LAYER_LAST]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.router_groups and self.router_active_groups is None:
            self.router_active_groups = max(1, self.router_groups // 16)
        if self.router_groups and self.router_hidden_size is None:
            self.router_hidden_size = max(1, self.hidden_size // 2)
        self._check()
        self._check_head()
        super().__post_init__(**kwargs)

    def _check_types(self) -> None:
        """A `config.json` may come from anywhere: every field is of its declared type before anything is computed."""
        for name, declared in CoralDraftConfig.__annotations__.items():
            value = getattr(self, name)
            if not any(_is_of(value, kind) for kind in typing.get_args(declared) or (declared,)):
                written = str(declared).removeprefix("<class '").removesuffix("'>").replace("NoneType", "None")
                raise ValueError(f"{name}={str(value)[:80]!r} must be of type {written}.")

    def _check(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; choose one of {list(SHAPES)}.")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "draft_depth",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_hidden_layers != 1:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers}: a CORAL drafter has exactly 1 layer.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        rope = self.rope_parameters
        theta, kind = rope.get("rope_theta", 10000.0), rope.get("rope_type", "default")
        if not (_is_of(theta, float) and theta > 0 and kind in ("default", *ROPE_INIT_FUNCTIONS)):
            raise ValueError(
                f"rope_parameters={rope} must hold a positive number as rope_theta and one of "
                f"{['default', *ROPE_INIT_FUNCTIONS]} as rope_type."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown to Transformers; 'silu' is the usual one.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs.")
        layers, depth = self.target_feature_layers, self.target_num_hidden_layers
        if not layers or min(layers) < FEATURE_LAYER_LAST or (depth is not None and max(layers) >= depth):
            raise ValueError(
                f"target_feature_layers={layers}: list at least one of -1 (after the final norm) and layers from 0 on"
                + ("." if depth is None else f"; the target has {depth} layers.")
            )
        if self.shape == "eagle" and self.target_feature_layers != [FEATURE_LAYER_LAST]:
            raise ValueError(
                f"shape='eagle' reads one feature, target_feature_layers=[-1]; got {self.target_feature_layers}. "
                "Use shape='eagle3' for several."
            )
        if self.shape == "eagle" and self.norm_before_residual:
            raise ValueError("norm_before_residual=True exists for shape='eagle3' only; set it to False.")
        if self.shape == "eagle3" and self.fc_bias:
            raise ValueError("fc_bias=True exists for shape='eagle' only; set it to False.")

        for row in self.draft_calibration or ():
            if len(row) != len(CALIBRATION_KNOTS) or list(row) != sorted(row) or row[0] < 0 or row[-1] > 1:
                raise ValueError(
                    f"draft_calibration holds {row}: a row is {len(CALIBRATION_KNOTS)} numbers from 0 to 1 that never "
                    "fall. Fit it with `coral-hf tune --save true`, or set it to null."
                )

    def _check_head(self) -> None:
        if self.router_grouping not in GROUPINGS:
            raise ValueError(f"router_grouping={self.router_grouping!r} is unknown; choose one of {list(GROUPINGS)}.")
        if self.router_groups:
            group_size(self.vocab_size, self.router_groups)
            if not 0 < self.router_active_groups <= self.router_groups:
                raise ValueError(
                    f"router_active_groups={self.router_active_groups} must be between 1 and "
                    f"router_groups={self.router_groups}."
                )
        if not 0 <= self.shortlist_size < self.vocab_size:
            raise ValueError(
                f"shortlist_size={self.shortlist_size} must be between 0 (none) and vocab_size - 1 = "
                f"{self.vocab_size - 1}."
            )
        if self.draft_vocab_size is None:
            return
        if self.shape != "eagle3" or not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} must be between 1 and vocab_size={self.vocab_size} and needs "
                f"shape='eagle3' (got {self.shape!r})."
            )
        if self.router_groups or self.shortlist_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} gives the drafter a head of its own; router and shortlist "
                "choose rows of the target's: set router_groups and shortlist_size to 0."
            )

    @property
    def num_target_features(self) -> int:
        return len(self.target_feature_layers)

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "CoralDraftConfig":
        """Derives a drafter's configuration from its target's.

        Args:
            target_config ([`PreTrainedConfig`]): configuration of a Llama-shaped causal LM (its text part is used).
            **overrides: any setting of [`CoralDraftConfig`].

        Returns:
            [`CoralDraftConfig`]

        Raises:
            ValueError: if the target is an encoder-decoder or lacks a dimension that the drafter needs.
        """
        if getattr(target_config, "is_encoder_decoder", False):
            raise ValueError(
                f"target model_type={target_config.model_type!r} is an encoder-decoder; CORAL drafts for decoder-only "
                "causal language models: choose one of those."
            )
        text = target_config.get_text_config()
        missing = [name for name in ("hidden_size", "num_attention_heads", "vocab_size") if not hasattr(text, name)]
        if missing:
            raise ValueError(
                f"target model_type={text.model_type!r} has no {missing} in its config, which a drafter is sized by: "
                "choose a target of Llama's layout, or see CONTRIBUTING, 'Adding a target family'."
            )
        heads = text.num_attention_heads
        settings = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            # Gemma calls it hidden_activation
            "hidden_act": getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None) or "silu",
            "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
            "max_position_embeddings": getattr(text, "max_position_embeddings", None) or 4096,
            "rope_parameters": _target_rope_parameters(text),
            "target_name_or_path": getattr(target_config, "_name_or_path", None) or None,
            "target_model_type": text.model_type,
            "target_num_hidden_layers": getattr(text, "num_hidden_layers", None),
            **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
        return cls(**{**settings, **overrides})


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:  # what a tensor's size can be
        return type(value) is int and abs(value) < 2**31
    return isinstance(value, kind)


def _target_rope_parameters(text: PreTrainedConfig) -> dict:
    """RoPE settings for the drafter's one full-attention layer, in full rotary width."""
    rope = copy.deepcopy(getattr(text, "rope_parameters", None)) or {}
    if "full_attention" in rope:  # one dict per layer type (Gemma 3)
        rope = rope["full_attention"]
    theta = rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    partial = rope.pop("partial_rotary_factor", None)
    if rope.get("rope_type", "default") == "default" or (partial or 1.0) != 1.0:
        # Scaling tables of partially rotated heads do not fit a fully rotated one: keep the base alone.
        return {"rope_type": "default", "rope_theta": float(theta)}
    return {**rope, "rope_theta": float(theta)}


def group_size(vocab_size: int, num_groups: int) -> int:
    """Ids per group, rounded up; every group holds at least one id.

    Raises:
        ValueError: if `num_groups` groups of that size leave one empty.
    """
    size = -(-vocab_size // num_groups) if num_groups > 0 else 0
    if not 1 < num_groups <= vocab_size or (num_groups - 1) * size >= vocab_size:
        raise ValueError(
            f"router_groups={num_groups} does not split {vocab_size} ids into groups of equal size: choose a number "
            f"from 2 to {vocab_size} that leaves no group empty, a power of two say."
        )
    return size


def vocab_hash(tokenizer) -> str:
    """SHA-256 over a tokenizer's sorted (token, id) pairs: equal hashes mean that ids mean the same text."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def check_vocabulary(config: CoralDraftConfig, tokenizer) -> None:
    """Raises `ValueError` if a drafter's recorded vocabulary hash is not the tokenizer's."""
    expected = config.target_vocab_hash
    if expected is not None and (found := vocab_hash(tokenizer)) != expected:
        raise ValueError(
            f"The tokenizer's vocabulary hash {found[:12]}... is not the drafter's {expected[:12]}...: it was made for "
            f"{config.target_name_or_path!r}. Use that target and its tokenizer, or train a drafter for this one."
        )


__all__ = ["CALIBRATION_KNOTS", "CoralDraftConfig", "check_vocabulary", "group_size", "vocab_hash"]
