"""The drafter's one decoder layer: its two shapes, its attention in training and drafting, KV cache and rollout rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from .configuration_coral import CoralDraftConfig
from .rollout_attention import rollout_attention


class DraftKeyValues:
    """The drafter's KV cache: preallocated and written at given slots, so that a draft step has static shapes.

    Slots `[0, length)` contain rows built from true target features. Slots after them are scratch for drafting, which the next
    write overwrites. The rows of a batch share their slots. If a row has fewer true features than another, some of its slots are
    empty, and the mask excludes them.
    """

    def __init__(
        self,
        config: CoralDraftConfig,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        batch_size: int = 1,
    ):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `[B, kv_heads, T, head_dim]` at slots `[start, start + T)`, growing the buffer if it must."""
        end = start + keys.shape[2]
        if end > self.max_length:
            self._grow(max(end, 2 * self.max_length))
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values

    def keep_rows(self, order: list[int]) -> None:
        """Keeps these rows of the batch, in this order."""
        self.keys, self.values = self.keys[order], self.values[order]

    def _grow(self, max_length: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], max_length, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


class CoralRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE. Its frequencies keep their dtype when the drafter is cast, because bf16 is too coarse for far positions."""

    def _apply(self, fn, *args, **kwargs):
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, *args, **kwargs)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class CoralRMSNorm(LlamaRMSNorm):
    """Llama's norm as one PyTorch operation, which is one kernel on a GPU."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:  # mixed precision: the result has the wider dtype
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def rotary_factors(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts RoPE's `[B, S, d]` cosines and sines for [`CoralAttention.project`]: `[B, 1, S, d]`, with signed sines."""
    half = sin.shape[-1] // 2
    return cos.unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of `[B, heads, S, d]` by [`rotary_factors`]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


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
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, key if key.dtype == value.dtype else key.to(value.dtype), value

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """`[B, heads, S, d]` -> `[B, S, H]`."""
        batch, _, length, _ = attended.shape
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None):
        """Plain attention with a bool mask `[B, 1, S, L]`. None: causal over S = L rows, or a single row that sees everything."""
        causal = mask is None and query.shape[2] > 1
        query = query if query.dtype == value.dtype else query.to(value.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=self.scaling, enable_gqa=True
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
        grouped = (query * self.scaling).reshape(batch, self.num_key_value_heads, self.num_groups, length, dim)
        shifts = [k - j for j in range(2, k + 1)]
        chain_keys, chain_values = (
            torch.stack([shift_rows(x, shift, dim=2) for x, shift in zip(later[1:], shifts, strict=True)], dim=3)
            for later in (keys, values)
        )  # [B, kv, S, k-1, d]
        attended = rollout_attention(grouped.to(values[0].dtype), keys[0], values[0], chain_keys, chain_values, mask)
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
    """The common part of both shapes: attention, residual, post-attention norm, MLP."""

    def __init__(self, config: CoralDraftConfig, attention_input_size: int):
        super().__init__()
        self.self_attn = CoralAttention(config, attention_input_size)
        self.post_attention_layernorm = CoralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = CoralMLP(config)

    def inputs(
        self, embedding: torch.Tensor, feature: torch.Tensor, fc: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention input from embedding and feature, and the residual stream. Differs between shapes."""
        raise NotImplementedError

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
        self.input_layernorm = CoralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = CoralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def inputs(
        self, embedding: torch.Tensor, feature: torch.Tensor, fc: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and feature `[B, S, H]` -> attention input `[B, S, 2H]` and residual `[B, S, H]`."""
        normed = self.hidden_norm(feature)
        residual = normed if self.norm_before_residual else feature
        return torch.cat([self.input_layernorm(embedding), normed], dim=-1), residual


@dataclass
class CoralRolloutOutput(ModelOutput):
    """Outputs of a K-step rollout.

    Args:
        hidden_states (`tuple` of K `torch.Tensor` of shape `[B, S, H]`):
            Step k's output at row r predicts feature f_{r+1}; `lm_head` of it predicts token x_{r+2}.
        valid (`tuple` of K `torch.BoolTensor` of shape `[B, S]`):
            Rows whose whole chain r-(k-1)..r is in one document. Outputs of other rows are meaningless.
        scores (*optional*):
            What the `scorer` of a call returned, tensors or tuples of them.
    """

    hidden_states: tuple[torch.Tensor, ...] | None = None
    valid: tuple[torch.Tensor, ...] | None = None
    scores: Any = None


def shift_rows(x: torch.Tensor, count: int, dim: int, fill: float = 0) -> torch.Tensor:
    """Moves rows `count` places towards higher indices along `dim`; the first `count` become `fill`."""
    if count == 0:
        return x
    shape = list(x.shape)
    shape[dim] = min(count, shape[dim])
    kept = x.narrow(dim, 0, x.shape[dim] - shape[dim])
    return torch.cat([x.new_full(shape, fill), kept], dim=dim)


def chain_rows(rows: torch.Tensor, step: int, batch: int, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Rows r whose chain r-(step-1)..r exists and is in one document, `[B, S]`."""
    exists = (rows >= step - 1).expand(batch, -1)
    if document_ids is None:
        return exists
    return exists & (shift_rows(document_ids, step - 1, dim=1, fill=-2) == document_ids)


def rollout_rows(
    rows: torch.Tensor,
    step: int,
    batch: int,
    document_ids: torch.Tensor | None = None,
    same: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The mask from the rows of a rollout's step k to the rows of step 1, and the valid rows of step k.

    Args:
        rows (`torch.LongTensor` of shape `[S]`): 0..S-1.
        step (`int`): k.
        batch (`int`): B.
        document_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): see [`CoralDraftModel.forward`].
        same (`torch.BoolTensor` of shape `[B, S, S]`, *optional*): rows of one document.

    Returns:
        `tuple`: the mask `[B, 1, S, S]`, None for a plain causal one, and the rows that count, `[B, S]`.
    """
    visible = rows[:, None] - (step - 1) >= rows  # [S, S]
    if step == 1:
        mask = None if same is None else (same & visible)[:, None]
        return mask, torch.ones(batch, len(rows), dtype=torch.bool, device=rows.device)
    mask = visible.expand(batch, 1, -1, -1) if same is None else (same & visible)[:, None]
    return mask, chain_rows(rows, step, batch, document_ids)


__all__ = [
    "CoralDraftLayer",
    "CoralRMSNorm",
    "CoralRolloutOutput",
    "CoralRotaryEmbedding",
    "DraftKeyValues",
    "Eagle3DraftLayer",
    "EagleDraftLayer",
    "chain_rows",
    "rollout_rows",
    "rotary_factors",
    "shift_rows",
]
