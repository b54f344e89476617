"""CoralDraftConfig: all settings of a CORAL drafter, with their defaults and sources."""

import hashlib
import json
import logging
from typing import Any

from transformers import PreTrainedConfig

from .configuration_checks import (
    CALIBRATION_KNOTS,
    FC_NORMS,
    FEATURE_LAYER_LAST,
    LOW_RANK_SETTINGS,
    check_draft_sizes,
    check_dtype,
    check_head,
    check_known,
    check_settings,
    check_types,
    group_count,
    group_size,
    most_draft_tokens,
)
from .configuration_from_target import settings_from_target
from .weight_files import loading


logger = logging.getLogger(__name__)

LOW_RANK_CANDIDATES = 64  # of a low-rank head, for each row

# None until `__post_init__` derives it from other settings
DERIVED: Any = None

# Keys that `PreTrainedConfig` accepts in addition to its declared fields (`Trainer` writes the tokenizer's special ids). Every
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

    Use [`CoralDraftConfig.from_target`] to derive all dimensions from a target. The defaults below are those of Llama-2-7B.

    Args:
        shape (`str`, defaults to `"eagle"`):
            Layer layout. `"eagle"` is the paper's (CORAL section 3, EAGLE-1): `fc` over embedding and feature, without input
            and final norms. `"eagle3"` is EAGLE-3's normed layer. On SmolLM2-135M, at equal data and steps (200k response
            tokens, K=1, one seed, layers of one size), a simulated chain of 5 reached tau 1.258 with `"eagle"`, 1.269 with
            `"eagle3"` over the same feature, 1.239 over EAGLE-3's three features, and 1.282 over those and the last one
            (`benchmarks/records/shapes.json` and, for the last, the shipped drafter's `training/ablation.json`). The
            default is the shape that every serving engine loads. The shipped drafter is of the last kind.
        vocab_size (`int`, defaults to 32000):
            V, the target's vocabulary size (`generate` requires both to be equal).
        hidden_size (`int`, defaults to 4096):
            H, the width of the drafter. It is always the target's, because the drafter uses its embedding and LM head.
        intermediate_size (`int`, defaults to 11008):
            Width of the MLP (the target's).
        num_attention_heads (`int`, defaults to 32), num_key_value_heads (`int`, *optional*), head_dim (`int`, *optional*):
            Attention geometry. [`~CoralDraftConfig.from_target`] takes the target's.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the gated MLP (the target's).
        rms_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the norms (the target's).
        max_position_embeddings (`int`, defaults to 4096):
            Longest context (the target's). The target itself warns about positions beyond it.
        rope_parameters (`dict`, *optional*):
            RoPE settings in Transformers' format (the target's full-attention ones).
        attention_bias (`bool`, defaults to `False`):
            Bias on q/k/v. False is supported by the serving engines for every target family.
        fc_bias (`bool`, defaults to `False`):
            Bias of `fc` (`"eagle"` only). vLLM rejects a bias; some old EAGLE checkpoints have one.
        norm_output (`bool`, defaults to `True`):
            `"eagle3"` only: use the output of `norm` (True, EAGLE-3.1) or its input (False, EAGLE-3) as the next step's
            feature.
        norm_before_residual (`bool`, defaults to `False`):
            `"eagle3"` only: the residual stream starts from the normed feature (True) or the raw feature (False, the only
            form that SGLang serves).
        norm_before_fc (`bool`, defaults to `False`), fc_norm (`bool`, defaults to `False`):
            `"eagle3"` over several features only, and at most one of the two: an RMSNorm before `fc` over all features
            together (`input_norm`), or a separate one for each (`fc_norm.0`, `fc_norm.1`, ...), as in vLLM, SGLang and
            speculators. False (EAGLE-3's form) is not written to the config.
        target_feature_layers (`list[int]`, *optional*, defaults to `[-1]`):
            Target features to read: -1 is the last hidden state after the final norm, i >= 0 the residual stream
            before layer i. More than one needs `shape="eagle3"` and gives it an `fc`.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of randomly initialised matrices (Llama's).
        target_name_or_path (`str`, *optional*), target_revision (`str`, *optional*), target_model_type (`str`, *optional*),
        target_num_hidden_layers (`int`, *optional*):
            The model that the drafter was trained for, with its commit if it is from the Hub. `generate` checks type and
            depth.
        target_vocab_hash (`str`, *optional*):
            [`vocab_hash`] of the target's tokenizer, which is checked if a tokenizer is available.
        target_embedding_scale (`float`, *optional*):
            The factor of the target's embedding ([`TargetAdapter.embedding_scale`] when the drafter was made; 1.0: no
            scaling). Serving engines pass unscaled embeddings to drafters. None (not written to the config): unknown.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the target's chat template (`enable_thinking`, ...) in the conversations of the drafter's last training;
            empty for the template's defaults. None (not written to the config): unknown, or several.
        bos_token_id (`int`, *optional*), eos_token_id (`int` or `list[int]`, *optional*), pad_token_id (`int`, *optional*):
            The target's special ids, from which `pipeline` concludes that both share a tokenizer.
        draft_depth (`int`, defaults to 5), draft_top_k (`int`, defaults to 1), draft_total_tokens (`int`, *optional*):
            Size of a draft: levels below the root, branches per node (1: a chain), nodes verified with the root. See
            `generation.settings.DraftSettings`, also for overriding them per call.
        draft_cost_aware (`bool`, defaults to `False`):
            Choose a draft's size at every step within these limits, from measured costs (`generation.tree_size`).
        draft_lookup (`bool`, defaults to `False`):
            Add continuations from the text itself to drafts (`generation.lookup`). This pays if answers repeat their prompts.
            False is not written to the config.
        draft_head (`str`, *optional*):
            Head that drafting uses, see `generation.settings.DraftSettings`. None, which is not written: all that the drafter has.
        draft_calibration (`list[list[float]]`, *optional*):
            One row per depth (the last row applies to all deeper levels): observed acceptance at the path probabilities
            `CALIBRATION_KNOTS`, fitted by `coral-hf tune`. None: drafted probabilities are used without calibration.
        router_groups (`int`, defaults to 0):
            G, groups of the LM-head router (CORAL section 3.2); 0: no router. All groups have size V / G, rounded up. G is
            lowered to the number of non-empty groups (768 groups of V = 262,144 become 767).
        router_grouping (`str`, defaults to `"consecutive"`):
            `"consecutive"`: groups of consecutive ids, views of the target's own head (the paper's). `"clustered"`
            (ours): groups of similar rows of the head, computed from one copy of it in the router's order.
        router_active_groups (`int`, *optional*):
            Groups computed per drafting step; defaults to a sixteenth of `router_groups`.
        router_hidden_size (`int`, *optional*):
            Width of the router's MLP (ours); defaults to half of `hidden_size`.
        shortlist_size (`int`, defaults to 0):
            Number of ids in the frequency shortlist, to which drafting is limited. With a router, they are active in addition
            to its groups. 0: no shortlist.
        low_rank_size (`int`, defaults to 0):
            r, rank of a low-rank head, which finds the ids that are scored with the target's rows (EAGLE-4's); 0, which is not
            written: no such head.
        low_rank_candidates (`int`, *optional*):
            Best ids of the low-rank head that are scored exactly, for each drafted row. Defaults to 64 (ours, not measured), or to
            the vocabulary if that is smaller. Only these can be drafted.
        draft_vocab_size (`int`, *optional*):
            `"eagle3"` only: rows of the drafter's own LM head (EAGLE-3 section 3: a reduced vocabulary), which replaces the
            target's for drafting. None: use the target's head.
    """

    model_type = "coral"

    shape: str = "eagle"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int = DERIVED
    head_dim: int = DERIVED
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: dict = DERIVED
    attention_bias: bool = False
    fc_bias: bool = False
    norm_output: bool = True
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    target_feature_layers: list[int] = DERIVED
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    target_name_or_path: str | None = None
    target_revision: str | None = None
    target_model_type: str | None = None
    target_num_hidden_layers: int | None = None
    target_vocab_hash: str | None = None
    target_embedding_scale: float | None = None
    chat_template_kwargs: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    draft_depth: int = 5
    draft_top_k: int = 1
    draft_total_tokens: int | None = None
    draft_cost_aware: bool = False
    draft_lookup: bool = False
    draft_head: str | None = None
    draft_calibration: list | None = None
    router_groups: int = 0
    router_grouping: str = "consecutive"
    router_active_groups: int | None = None
    router_hidden_size: int | None = None
    shortlist_size: int = 0
    low_rank_size: int = 0
    low_rank_candidates: int | None = None
    draft_vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        unknown = sorted(key for key in kwargs if key not in _BASE_KEYS)
        check_known(self, unknown, kwargs.get("model_type"))
        check_types(self, CoralDraftConfig.__annotations__)
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            check_dtype(dtype)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_feature_layers is None:
            self.target_feature_layers = [FEATURE_LAYER_LAST]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.router_groups and self.vocab_size > 0:  # `check_settings` refuses others
            asked, self.router_groups = self.router_groups, group_count(self.vocab_size, self.router_groups)
            if self.router_groups < asked:
                # logged once, because the saved config contains the real number
                logger.warning(
                    "router_groups=%d: groups of %d ids hold the %d ids in %d groups; the router has that many groups.",
                    *(asked, group_size(self.vocab_size, asked), self.vocab_size, self.router_groups),
                )
        if self.router_groups and self.router_active_groups is None:
            self.router_active_groups = max(1, self.router_groups // 16)
        if self.router_groups and self.router_hidden_size is None:
            self.router_hidden_size = max(1, self.hidden_size // 2)
        if self.low_rank_size and self.low_rank_candidates is None:
            self.low_rank_candidates = max(1, min(LOW_RANK_CANDIDATES, self.vocab_size))
        check_settings(self)
        check_head(self)
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, TypeError) as error:  # raised by Transformers for invalid `id2label` or `num_labels`
            raise ValueError(
                f"A setting that all Transformers configs share is malformed ({type(error).__name__}: {error}). Leave "
                "id2label, label2id and num_labels out: a drafter has no labels."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        # drafters without these settings keep their config.json byte for byte, and older releases can load them
        for name in ("target_embedding_scale", "draft_lookup", "draft_head", *LOW_RANK_SETTINGS, *FC_NORMS):
            if not settings.get(name):
                settings.pop(name, None)
        if settings.get("chat_template_kwargs") is None:
            settings.pop("chat_template_kwargs", None)
        return settings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "CoralDraftConfig":
        """Reads the `config.json` of a folder or of the Hub, as [`~transformers.PreTrainedConfig.from_pretrained`].

        Raises:
            ValueError: if it is missing, contains no JSON object, or has an unknown or malformed value.
        """
        with loading(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        settings, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Transformers would continue with the defaults, and some of its releases add their own keys
        if all(name.startswith("_") for name in settings):
            raise ValueError(
                f"{pretrained_model_name_or_path} contains no config.json, or one without settings: the upload or copy is "
                "not complete, or it is not a drafter. Fetch it again, or save the drafter again with "
                "drafter.save_pretrained(folder)."
            )
        return settings, unused

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict:
        settings = super()._dict_from_json_file(json_file)
        if not isinstance(settings, dict):
            raise ValueError(
                f"{json_file} must contain a JSON object, got {str(settings)[:80]!r}. Fetch it again, or save the drafter "
                "again with drafter.save_pretrained(folder)."
            )
        return settings

    @property
    def num_target_features(self) -> int:
        return len(self.target_feature_layers)

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "CoralDraftConfig":
        """Derives a drafter's configuration from its target's.

        Args:
            target_config ([`PreTrainedConfig`]): configuration of a Llama-shaped causal LM (its text part is used).
            **overrides: any setting of [`CoralDraftConfig`], for example `target_revision` if the Hub's cache contains several
                commits of the target.

        Returns:
            [`CoralDraftConfig`]

        Raises:
            ValueError: if the target is an encoder-decoder or lacks a dimension that the drafter needs.
        """
        return cls(**{**settings_from_target(target_config), **overrides})


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


__all__ = [
    "CALIBRATION_KNOTS",
    "FC_NORMS",
    "FEATURE_LAYER_LAST",
    "LOW_RANK_SETTINGS",
    "CoralDraftConfig",
    "check_draft_sizes",
    "check_vocabulary",
    "group_count",
    "group_size",
    "most_draft_tokens",
    "vocab_hash",
]
