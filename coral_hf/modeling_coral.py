"""CoralDraftModel: one decoder layer that reads a target's features and drafts its next tokens.

One `forward` is one K-step rollout over a batch of sequences (training); one `draft` call is one drafting step over a
handful of rows with a preallocated KV cache (generation). The target's embedding and LM head are never part of the
module: callers go through `TargetAdapter`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.utils import ModelOutput

from .configuration_coral import CoralDraftConfig
from .lm_head_router import FrequencyShortlist, LMHeadRouter


@dataclass
class CoralRolloutOutput(ModelOutput):
    """Outputs of a K-step rollout.

    Args:
        hidden_states (`tuple` of K `torch.Tensor` of shape `[B, S, H]`):
            Step k's output at row r predicts feature f_{r+1}; `lm_head` of it predicts token x_{r+2}.
        valid (`tuple` of K `torch.BoolTensor` of shape `[B, S]`):
            Rows whose whole chain r-(k-1)..r lies in one document; outputs of other rows mean nothing.
    """

    hidden_states: tuple[torch.Tensor, ...] | None = None
    valid: tuple[torch.Tensor, ...] | None = None


class DraftKeyValues:
    """The drafter's KV cache: preallocated, written at given slots, so that a draft step has static shapes.

    Slots `[0, length)` hold rows built from true target features; whatever drafting writes behind them is scratch
    that the next write overwrites.
    """

    def __init__(self, config: CoralDraftConfig, max_length: int, dtype: torch.dtype, device: torch.device | str):
        shape = (1, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `[1, kv_heads, T, head_dim]` at slots `[start, start + T)`, growing the buffer if it must."""
        end = start + keys.shape[2]
        if end > self.max_length:
            self._grow(max(end, 2 * self.max_length))
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values

    def _grow(self, max_length: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], max_length, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


class CoralRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE, whose frequencies keep their dtype when the drafter is cast: in bf16 far positions would turn."""

    def _apply(self, fn, *args, **kwargs):
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, *args, **kwargs)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class CoralAttention(nn.Module):
    """Grouped-query attention of the drafter: projections here, the two attention patterns as methods."""

    def __init__(self, config: CoralDraftConfig, input_size: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_size, key_value_size = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[B, S, input_size]` -> rotated queries `[B, heads, S, d]`, rotated keys and values `[B, kv_heads, S, d]`."""
        batch, length = x.shape[:2]
        query = self.q_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
        return query, key.to(value.dtype), value

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """`[B, heads, S, d]` -> `[B, S, H]`."""
        batch, _, length, _ = attended.shape
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None):
        """Plain attention with a bool mask `[B, 1, S, L]` (None: causal)."""
        return F.scaled_dot_product_attention(
            query.to(value.dtype), key, value, mask, is_causal=mask is None, scale=self.scaling, enable_gqa=True
        )

    def attend_rollout(
        self,
        query: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of rollout step k = len(keys) >= 2 in its diagonal form, O(S^2 + K S).

        Row r sees true-feature columns c <= r-(k-1) of step 1 through `mask` `[B, 1, S, S]`, then its own chain: of
        step j = 2..k the single row r-(k-j). One softmax over all of them (HASS section 3.2, with -inf masks).
        """
        batch, heads, length, dim = query.shape
        k = len(keys)
        grouped = query.reshape(batch, self.num_key_value_heads, self.num_groups, length, dim) * self.scaling
        # softmax in float32 at least, as every attention implementation does
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = torch.einsum("bgnsd,bgcd->bgnsc", grouped, keys[0])  # [B, kv, n, S, S]
        scores = scores.to(dtype).masked_fill(~mask.unsqueeze(2), float("-inf"))
        shifts = [k - j for j in range(2, k + 1)]
        diagonal_keys = [shift_rows(key, shift, dim=2) for key, shift in zip(keys[1:], shifts, strict=True)]
        diagonals = [(grouped * key.unsqueeze(2)).sum(-1, dtype=dtype) for key in diagonal_keys]
        chain = torch.stack(diagonals, dim=-1)  # [B, kv, n, S, k-1]
        weights = torch.cat([scores, chain], dim=-1).softmax(dim=-1).to(query.dtype)
        attended = torch.einsum("bgnsc,bgcd->bgnsd", weights[..., :length], values[0])
        for index, (value, shift) in enumerate(zip(values[1:], shifts, strict=True)):
            attended = attended + weights[..., length + index, None] * shift_rows(value, shift, dim=2).unsqueeze(2)
        return attended.reshape(batch, heads, length, dim)


class CoralMLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: CoralDraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class CoralDraftLayer(nn.Module):
    """What both shapes share: attention, residual, post-attention norm, MLP."""

    def __init__(self, config: CoralDraftConfig, attention_input_size: int):
        super().__init__()
        self.self_attn = CoralAttention(config, attention_input_size)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = CoralMLP(config)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Attention output `[B, heads, S, d]` and residual `[B, S, H]` -> the layer's output `[B, S, H]`."""
        hidden = residual + self.self_attn.merge(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleDraftLayer(CoralDraftLayer):
    """The paper's layer: attention over `fc([embedding ; feature])`, no input norm (`fc` lives in the model)."""

    def __init__(self, config: CoralDraftConfig):
        super().__init__(config, config.hidden_size)

    def inputs(
        self, embedding: torch.Tensor, feature: torch.Tensor, fc: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and feature `[B, S, H]` -> attention input `[B, S, H]` and residual `[B, S, H]`."""
        fused = fc(torch.cat([embedding, feature], dim=-1))
        return fused, fused


class Eagle3DraftLayer(CoralDraftLayer):
    """EAGLE-3's layer: normed embedding and normed feature concatenated, residual from the feature."""

    def __init__(self, config: CoralDraftConfig):
        super().__init__(config, 2 * config.hidden_size)
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def inputs(
        self, embedding: torch.Tensor, feature: torch.Tensor, fc: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and feature `[B, S, H]` -> attention input `[B, S, 2H]` and residual `[B, S, H]`."""
        normed = self.hidden_norm(feature)
        residual = normed if self.norm_before_residual else feature
        return torch.cat([self.input_layernorm(embedding), normed], dim=-1), residual


class CoralDraftModel(PreTrainedModel):
    """A CORAL drafter (Weng et al., ACL 2025): pass it to `target.generate(..., assistant_model=drafter)`.

    Row t reads the target's embedding of token x_{t+1} and the feature f_t and predicts f_{t+1}, whose LM-head logits
    are those of token x_{t+2}; in later steps its own output stands in for the missing feature.

    Args:
        config ([`CoralDraftConfig`])
    """

    config_class = CoralDraftConfig
    base_model_prefix = "coral"
    main_input_name = "inputs_embeds"
    _no_split_modules: ClassVar[list[str]] = ["EagleDraftLayer", "Eagle3DraftLayer"]
    _supports_sdpa = True

    def __init__(self, config: CoralDraftConfig):
        super().__init__(config)
        size = config.hidden_size
        if config.shape == "eagle":
            self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
            self.layers = nn.ModuleList([EagleDraftLayer(config)])
            self.norm = nn.Identity()
        else:
            # A single feature is as wide as the drafter: no fc, as both serving engines expect.
            features = config.num_target_features
            self.fc = nn.Linear(features * size, size, bias=False) if features > 1 else nn.Identity()
            self.layers = nn.ModuleList([Eagle3DraftLayer(config)])
            self.norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
        self.rotary_emb = CoralRotaryEmbedding(config)
        self.router = None
        if config.router_groups:
            self.router = LMHeadRouter(size, config.vocab_size, config.router_groups, config.router_hidden_size)
        self.shortlist = FrequencyShortlist(config.shortlist_size) if config.shortlist_size else None
        # Acceptance statistics of the last `generate` call, see `generation.candidate_generator.DraftStats`.
        self.last_stats = None
        self.post_init()

    @classmethod
    def from_target(cls, target: PreTrainedModel, tokenizer: Any = None, **overrides: Any) -> "CoralDraftModel":
        """Builds an untrained drafter for `target`: dimensions and starting weights from the target.

        Args:
            target (`PreTrainedModel`): a Llama-shaped causal LM.
            tokenizer (*optional*): the target's tokenizer; its vocabulary hash is recorded in the config.
            **overrides: settings of [`CoralDraftConfig`].

        Returns:
            [`CoralDraftModel`] in float32 on the CPU.
        """
        from .draft_initialization import initialize_from_target

        return initialize_from_target(cls, target, tokenizer, overrides)

    def add_router(self, num_groups: int, active_groups: int | None = None) -> LMHeadRouter:
        """Gives the drafter a new, untrained LM-head router, replacing any it has.

        Args:
            num_groups (`int`): G, groups of consecutive ids.
            active_groups (`int`, *optional*): groups computed per drafting step; defaults to a sixteenth.

        Raises:
            ValueError: if the numbers do not fit the vocabulary or each other.
        """
        settings = {**self.config.to_dict(), "router_groups": num_groups, "router_active_groups": active_groups}
        config = type(self.config)(**{key: value for key, value in settings.items() if key != "model_type"})
        for name in ("router_groups", "router_active_groups", "router_hidden_size"):
            setattr(self.config, name, getattr(config, name))
        router = LMHeadRouter(config.hidden_size, config.vocab_size, num_groups, config.router_hidden_size)
        self.router = router.to(device=self.device, dtype=self.dtype)
        return self.router

    def add_shortlist(self, counts: torch.Tensor, size: int) -> FrequencyShortlist:
        """Limits drafting to the `size` most frequent ids of `[V]` counts, beside a router's groups if there is one.

        Raises:
            ValueError: if `size` is not between 1 and V - 1, or `counts` is not of length V.
        """
        if counts.shape != (self.config.vocab_size,) or not 0 < size < self.config.vocab_size:
            raise ValueError(
                f"size={size} with counts of shape {tuple(counts.shape)}: give one count for each of the "
                f"{self.config.vocab_size} ids and a size below that."
            )
        self.config.shortlist_size = size
        self.shortlist = FrequencyShortlist(size).count(counts.cpu()).to(self.device)
        return self.shortlist

    @property
    def layer(self) -> CoralDraftLayer:
        return self.layers[0]

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Target features `[B, S, n * H]` -> the layer's feature input `[B, S, H]` (fc over several layers)."""
        return self.fc(features) if self.config.num_target_features > 1 else features

    def _outputs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output -> (input of the LM head, next step's feature), both `[B, S, H]`."""
        normed = self.norm(hidden)
        return normed, (normed if self.config.norm_output else hidden)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        num_steps: int = 1,
        position_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
    ) -> CoralRolloutOutput:
        """One K-step rollout (HASS's harmonised context alignment, HASS section 3.2; CORAL section 3.1).

        Step 1 is teacher-forced. In step k the input feature of row r is the drafter's own output of step k-1 at row
        r-1, detached, and row r attends to what inference would see (see `CoralAttention.attend_rollout`).

        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, S, H]`): row r holds e(x_{r+1}).
            features (`torch.Tensor` of shape `[B, S, n * H]`): row r holds the target's f_r.
            num_steps (`int`): K.
            position_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): defaults to 0..S-1.
            document_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): rows attend inside one document only;
                padding has an id of its own (-1). Defaults to one document a row.

        Returns:
            [`CoralRolloutOutput`]
        """
        batch, length, _ = inputs_embeds.shape
        device = inputs_embeds.device
        rows = torch.arange(length, device=device)
        if position_ids is None:
            position_ids = rows.expand(batch, length)
        cos, sin = self.rotary_emb(inputs_embeds, position_ids)
        causal = rows[:, None] >= rows  # [S, S]
        same = None if document_ids is None else document_ids[:, :, None] == document_ids[:, None, :]  # [B, S, S]

        layer, attention = self.layer, self.layer.self_attn
        feature = self.project_features(features)
        keys, values, outputs, valids = [], [], [], []
        for step in range(1, num_steps + 1):
            attention_input, residual = layer.inputs(inputs_embeds, feature, self.fc)
            query, key, value = attention.project(attention_input, cos, sin)
            keys.append(key)
            values.append(value)
            if step == 1:
                mask = None if same is None else (same & causal)[:, None]
                attended = attention.attend(query, key, value, mask)
                valid = torch.ones(batch, length, dtype=torch.bool, device=device)
            else:
                visible = rows[:, None] - (step - 1) >= rows
                mask = visible.expand(batch, 1, length, length) if same is None else (same & visible)[:, None]
                attended = attention.attend_rollout(query, keys, values, mask)
                valid = self._chain_rows(rows, step, batch, document_ids)
            normed, fed_back = self._outputs(layer.finish(attended.to(residual.dtype), residual))
            outputs.append(normed)
            valids.append(valid)
            feature = shift_rows(fed_back.detach(), 1, dim=1)
        return CoralRolloutOutput(hidden_states=tuple(outputs), valid=tuple(valids))

    @staticmethod
    def _chain_rows(rows: torch.Tensor, step: int, batch: int, document_ids: torch.Tensor | None) -> torch.Tensor:
        """Rows r whose chain r-(step-1)..r exists and lies in one document, `[B, S]`."""
        exists = (rows >= step - 1).expand(batch, -1)
        if document_ids is None:
            return exists
        return exists & (shift_rows(document_ids, step - 1, dim=1, fill=-2) == document_ids)

    def draft(
        self,
        inputs_embeds: torch.Tensor,
        feature: torch.Tensor,
        position_ids: torch.LongTensor,
        cache: DraftKeyValues,
        slot: int,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One drafting step over T rows that are written to cache slots `[slot, slot + T)`.

        Args:
            inputs_embeds (`torch.Tensor` of shape `[1, T, H]`): embeddings of the rows' tokens.
            feature (`torch.Tensor` of shape `[1, T, H]`): projected true features ([`project_features`]), or the
                fed-back output of the rows' parents.
            position_ids (`torch.LongTensor` of shape `[1, T]`).
            cache ([`DraftKeyValues`])
            slot (`int`): first cache slot to write.
            mask (`torch.BoolTensor` of shape `[1, 1, T, slot + T]`, *optional*): what each row sees; None: causal.

        Returns:
            `tuple`: input of the LM head and next step's feature, both `[1, T, H]`.
        """
        length = inputs_embeds.shape[1]
        cos, sin = self.rotary_emb(inputs_embeds, position_ids)
        attention_input, residual = self.layer.inputs(inputs_embeds, feature, self.fc)
        query, key, value = self.layer.self_attn.project(attention_input, cos, sin)
        cache.write(slot, key, value)
        end = slot + length
        if mask is None and length > 1:
            columns = torch.arange(end, device=query.device)
            mask = (columns <= columns[slot:, None])[None, None]
        elif mask is None:
            mask = torch.ones(1, 1, 1, end, dtype=torch.bool, device=query.device)
        attended = self.layer.self_attn.attend(query, cache.keys[:, :, :end], cache.values[:, :, :end], mask)
        return self._outputs(self.layer.finish(attended, residual))


def shift_rows(x: torch.Tensor, count: int, dim: int, fill: float = 0) -> torch.Tensor:
    """Moves rows `count` places towards higher indices along `dim`; the first `count` become `fill`."""
    if count == 0:
        return x
    shape = list(x.shape)
    shape[dim] = min(count, shape[dim])
    kept = x.narrow(dim, 0, x.shape[dim] - shape[dim])
    return torch.cat([x.new_full(shape, fill), kept], dim=dim)


__all__ = ["CoralDraftModel"]
