"""CoralDraftModel: one decoder layer that reads a target's features and drafts its next tokens.

A `forward` is a K-step rollout over a batch of sequences (training). A `draft` call is a drafting step over a few rows with a
preallocated KV cache (generation). The target's embedding and LM head are not part of the module: callers use
`TargetAdapter`.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_coral import CoralDraftConfig
from .draft_head import DraftVocabularyHead, FrequencyShortlist, LMHeadRouter, LowRankHead
from .draft_initialization import initialize_from_target, new_low_rank_head, new_router, new_shortlist
from .draft_layer import (
    CoralDraftLayer,
    CoralRMSNorm,
    CoralRolloutOutput,
    CoralRotaryEmbedding,
    DraftKeyValues,
    Eagle3DraftLayer,
    EagleDraftLayer,
    rollout_rows,
    rotary_factors,
    shift_rows,
)
from .package_methods import PackageMethods
from .weight_files import check_before_loading, check_shapes, follow_umask, loading


class CoralDraftModel(PackageMethods, PreTrainedModel):
    """A CORAL drafter (Weng et al., ACL 2025): pass it to `target.generate(..., assistant_model=drafter)`.

    Row t reads the target's embedding of token x_{t+1} and the feature f_t and predicts f_{t+1}, whose LM-head logits
    are those of token x_{t+2}; in later steps its own output replaces the missing feature.

    Args:
        config ([`CoralDraftConfig`])
    """

    config_class = CoralDraftConfig
    base_model_prefix = "coral"
    main_input_name = "inputs_embeds"
    _no_split_modules: ClassVar[list[str]] = ["EagleDraftLayer", "Eagle3DraftLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: CoralDraftConfig):
        super().__init__(config)
        size = config.hidden_size
        if config.shape == "eagle":
            self.fc: nn.Module = nn.Linear(2 * size, size, bias=config.fc_bias)
            self.layers = nn.ModuleList([EagleDraftLayer(config)])
            self.norm = nn.Identity()
        else:
            # A single feature is as wide as the drafter, so there is no fc, as both serving engines expect.
            features = config.num_target_features
            self.fc = nn.Linear(features * size, size, bias=False) if features > 1 else nn.Identity()
            # Norms before it have the same names as in the serving engines.
            if config.norm_before_fc:
                self.input_norm = CoralRMSNorm(features * size, eps=config.rms_norm_eps)
            if config.fc_norm:
                self.fc_norm = nn.ModuleList(CoralRMSNorm(size, eps=config.rms_norm_eps) for _ in range(features))
            self.layers = nn.ModuleList([Eagle3DraftLayer(config)])
            self.norm = CoralRMSNorm(size, eps=config.rms_norm_eps)
        self.rotary_emb = CoralRotaryEmbedding(config)
        self.router: Any = None
        if config.router_groups:
            self.router = LMHeadRouter.from_config(config)
        self.shortlist = FrequencyShortlist(config.shortlist_size) if config.shortlist_size else None
        self.low_rank: Any = LowRankHead.from_config(config) if config.low_rank_size else None
        own = config.draft_vocab_size
        self.draft_head = None if own is None else DraftVocabularyHead(size, own)
        # Acceptance statistics of the last `generate` call, see `generation.statistics.DraftStats`.
        self.last_stats: Any = None
        self.gradient_checkpointing = False
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Saves as every model does, and gives the weights the file mode of the config."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        follow_umask(save_directory)
        return saved

    @classmethod
    def from_target(cls, target: PreTrainedModel | str, tokenizer: Any = None, **overrides: Any) -> "CoralDraftModel":
        """Builds an untrained drafter for `target`, with dimensions and initial weights derived from the target.

        Args:
            target (`PreTrainedModel` or `str`): a Llama-shaped causal LM, or its path or Hub id.
            tokenizer (*optional*): the target's tokenizer, whose vocabulary hash the config records. It is loaded if the
                target is given by name.
            **overrides: settings of [`CoralDraftConfig`].

        Returns:
            [`CoralDraftModel`] in float32 on the CPU.
        """
        return initialize_from_target(cls, target, tokenizer, overrides)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "CoralDraftModel":
        """Loads a drafter from a folder or the Hub, from safetensors only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or Hub id.
            *args, **kwargs: as for [`~transformers.PreTrainedModel.from_pretrained`] (`revision`, `token`, `dtype`, ...).

        Raises:
            ValueError: if the weights are missing, pickled, damaged, larger than the config allows or of other shapes, or
                the config is missing or malformed.
        """
        with loading(pretrained_model_name_or_path):
            if pretrained_model_name_or_path is not None and not kwargs.get("variant"):
                check_before_loading(cls, pretrained_model_name_or_path, kwargs)
            # mismatched sizes are listed, so that the error can name them
            ours = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, **ours})
        if not kwargs.get("ignore_mismatched_sizes"):
            check_shapes(pretrained_model_name_or_path, info["mismatched_keys"])
        loaded: Any = (model, info) if kwargs.get("output_loading_info") else model
        return loaded

    def add_router(
        self, num_groups: int, active_groups: int | None = None, grouping: str = "consecutive"
    ) -> LMHeadRouter:
        """Gives the drafter a new, untrained LM-head router, replacing any it has.

        Args:
            num_groups (`int`): G; see `router_groups` of [`CoralDraftConfig`].
            active_groups (`int`, *optional*): groups computed per drafting step; defaults to a sixteenth.
            grouping (`str`): `"consecutive"` ids, or `"clustered"`; `CoralRouterTrainer` then finds the clusters.

        Raises:
            ValueError: if the numbers do not fit the vocabulary or each other.
        """
        return new_router(self, num_groups, active_groups, grouping)

    def add_shortlist(self, counts: torch.Tensor, size: int) -> FrequencyShortlist:
        """Limits drafting to the `size` most frequent ids of `[V]` counts, beside a router's groups if there is one.

        Raises:
            ValueError: if `size` is not an integer between 1 and V - 1, `counts` is not a tensor of length V, or the drafter has a
                head of its own.
        """
        return new_shortlist(self, counts, size)

    def add_low_rank_head(
        self, target: PreTrainedModel | str, rank: int, candidates: int | None = None
    ) -> LowRankHead:
        """Gives the drafter a low-rank head, which begins as the truncated SVD of the target's, replacing any it has.

        Train it (`CoralLowRankTrainer`) before drafting: the SVD alone finds too few of the likely tokens.

        Args:
            target (`PreTrainedModel` or `str`): the drafter's target, or its path or Hub id.
            rank (`int`): r; see `low_rank_size` of [`CoralDraftConfig`].
            candidates (`int`, *optional*): best ids that are scored exactly; see `low_rank_candidates`.

        Raises:
            ValueError: if the numbers do not fit the target's sizes, the drafter has a head of its own or is another target's, or
                rows of the target's head cannot be taken.
        """
        return new_low_rank_head(self, target, rank, candidates)

    def __getattr__(self, name: str) -> Any:
        # What Transformers' own assisted decoding asks a drafter for first. An AttributeError, so that hasattr stays right; a
        # property's would end here without its message.
        if name == "generation_config":
            raise AttributeError(
                f"{type(self).__name__} has no generation_config: it drafts from a target's features and generates nothing by "
                "itself. To use it as assistant_model, `pip install coral-hf` and `import coral_hf` before generate; if that "
                "was done, this Transformers release is not one the package knows (transformers>=5.17,<6)."
            )
        return super().__getattr__(name)

    def get_input_embeddings(self) -> None:
        """None, because the embedding is the target's. FSDP calls this."""
        return None

    @property
    def layer(self) -> CoralDraftLayer:
        return cast(CoralDraftLayer, self.layers[0])

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Target features `[B, S, n * H]` -> the layer's feature input `[B, S, H]` (fc over several, normed or not)."""
        if self.config.num_target_features == 1:
            return features
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)  # n of [B, S, H]
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def rotary(self, position_ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cosines and sines for positions `[B, S]`, `[B, 1, S, d]` each, on the device and in the dtype of `x`."""
        return rotary_factors(*self.rotary_emb(x, position_ids))

    def _outputs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output -> (input of the LM head, next step's feature), both `[B, S, H]`."""
        normed = self.norm(hidden)
        return normed, (normed if self.config.norm_output else hidden)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        num_steps: int = 1,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        scorer: Callable[["CoralDraftModel", CoralRolloutOutput], Any] | None = None,
    ) -> CoralRolloutOutput:
        """One K-step rollout (HASS's harmonised context alignment, HASS section 3.2; CORAL section 3.1).

        Step 1 is teacher-forced. In step k the input feature of row r is the drafter's own output of step k-1 at row
        r-1, detached, and row r attends to what inference would see (see `CoralAttention.attend_rollout`).

        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, S, H]`): row r contains e(x_{r+1}).
            features (`torch.Tensor` of shape `[B, S, n * H]`): row r contains the target's f_r.
            num_steps (`int`): number of steps K.
            position_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): defaults to 0..S-1.
            document_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): rows attend inside one document only;
                padding has its own id (-1). Defaults to one document per row.
            scorer (`Callable`, *optional*): called with the drafter and its outputs; what it returns becomes `scores`. Within the
                forward, sharded weights are whole, and processes wait for the gradients of all that it reads.

        Returns:
            [`CoralRolloutOutput`]
        """
        batch, length, _ = inputs_embeds.shape
        device = inputs_embeds.device
        rows = torch.arange(length, device=device)
        if position_ids is None:
            position_ids = rows.expand(batch, length)
        cos, sin = self.rotary(position_ids, inputs_embeds)
        same = None if document_ids is None else document_ids[:, :, None] == document_ids[:, None, :]  # [B, S, S]

        feature = self.project_features(features)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        outputs, valids = [], []
        for step in range(1, num_steps + 1):
            mask, valid = rollout_rows(rows, step, batch, document_ids, same)
            run = self._rollout_step
            if self.gradient_checkpointing and self.training:
                run = partial(self._gradient_checkpointing_func, run)
            normed, fed_back, key, value = run(inputs_embeds, feature, cos, sin, mask, *keys, *values)
            keys.append(key)
            values.append(value)
            outputs.append(normed)
            valids.append(valid)
            feature = shift_rows(fed_back.detach(), 1, dim=1)
        output = CoralRolloutOutput(hidden_states=tuple(outputs), valid=tuple(valids))
        if scorer is None:
            return output
        return CoralRolloutOutput(**output, scores=scorer(self, output))

    def _rollout_step(
        self,
        inputs_embeds: torch.Tensor,
        feature: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        *earlier: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Computes step k from the keys and values of steps 1..k-1: its two outputs, and its own keys and values.

        Gradient checkpointing recomputes exactly this in the backward pass.
        """
        layer, attention = self.layer, self.layer.self_attn
        attention_input, residual = layer.inputs(inputs_embeds, feature, self.fc)
        query, key, value = attention.project(attention_input, cos, sin)
        if earlier and mask is not None:
            half = len(earlier) // 2
            attended = attention.attend_rollout(query, [*earlier[:half], key], [*earlier[half:], value], mask)
        else:
            attended = attention.attend(query, key, value, mask)
        normed, fed_back = self._outputs(layer.finish(attended.to(residual.dtype), residual))
        return normed, fed_back, key, value

    def draft(
        self,
        inputs_embeds: torch.Tensor,
        feature: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: DraftKeyValues,
        slot: int,
        mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One drafting step over T rows that are written to cache slots `[slot, slot + T)`.

        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, T, H]`): embeddings of the rows' tokens.
            feature (`torch.Tensor` of shape `[B, T, H]`): projected true features ([`project_features`]), or the
                fed-back output of the rows' parents.
            position_ids (`torch.LongTensor` of shape `[B, T]`, or `[1, T]` for all rows).
            cache ([`DraftKeyValues`])
            slot (`int`): first cache slot to write.
            mask (`torch.Tensor` of shape `[B, 1, T, slot + T]`, *optional*): what each row sees (bool), or what is added to its
                scores; None: causal.
            rotary (`tuple` of `torch.Tensor` of shape `[B or 1, 1, T, d]`, *optional*): of the positions, from [`rotary`], where
                it is known already; `position_ids` are not read then.

        Returns:
            `tuple`: input of the LM head and next step's feature, both `[B, T, H]`.
        """
        length = inputs_embeds.shape[1]
        if rotary is None:
            if position_ids is None:
                raise ValueError(
                    "draft needs the rows' positions: pass position_ids, or the output of rotary for them."
                )
            rotary = self.rotary(position_ids, inputs_embeds)
        cos, sin = rotary
        attention_input, residual = self.layer.inputs(inputs_embeds, feature, self.fc)
        query, key, value = self.layer.self_attn.project(attention_input, cos, sin)
        cache.write(slot, key, value)
        end = slot + length
        # A prompt at slot 0 (whose mask would take 1 GiB for 32k tokens) and a single row need no mask.
        if mask is None and slot > 0 and length > 1:
            columns = torch.arange(end, device=query.device)
            mask = (columns <= columns[slot:, None])[None, None]
        attended = self.layer.self_attn.attend(query, cache.keys[:, :, :end], cache.values[:, :, :end], mask)
        return self._outputs(self.layer.finish(attended, residual))


__all__ = ["CoralDraftModel"]
