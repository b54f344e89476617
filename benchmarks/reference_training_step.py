"""The reference of `benchmark_training.py`: a plain implementation of HASS's training step (arXiv 2408.15766, section 3.2).

Written from the papers in plain PyTorch, in the obvious way. In step k, the queries are multiplied by the keys of all k steps
in full [S, S] matrices, from which masks select the entries that inference would see. Logits of all response rows are stored
in float32. One autograd graph contains all K steps. It uses bf16 autocast, and AdamW with clipping at 0.5. No code of
`coral_hf` runs here. Only its drafter's weights (shape "eagle") are copied, so that both sides do the same work from the same
start.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class ReferenceDrafter(nn.Module):
    """EAGLE's layer: fc([embedding ; feature]), attention without an input norm, gated MLP after a norm."""

    def __init__(self, drafter: nn.Module):
        super().__init__()
        config = drafter.config
        if config.shape != "eagle" or config.attention_bias or config.hidden_act != "silu":
            raise ValueError(f"The reference only supports the plain shape 'eagle', not {config.shape!r}.")
        size, self.dim, self.eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        query, key = config.num_attention_heads * self.dim, config.num_key_value_heads * self.dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.q_proj, self.o_proj = nn.Linear(size, query, bias=False), nn.Linear(query, size, bias=False)
        self.k_proj, self.v_proj = nn.Linear(size, key, bias=False), nn.Linear(size, key, bias=False)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
        self.norm = nn.Parameter(torch.ones(size))
        weights = {name.split(".")[-2]: value for name, value in drafter.state_dict().items()}
        weights["norm"] = weights.pop("post_attention_layernorm")
        own = {name: weights[name.split(".")[0]] for name in self.state_dict() if not name.endswith("bias")}
        if config.fc_bias:
            own["fc.bias"] = drafter.fc.bias
        self.load_state_dict(own)

    def forward(self, embeds: torch.Tensor, features: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
        """Embeddings and features `[B, S, H]` -> the outputs of all K steps, each `[B, S, H]`."""
        length = embeds.shape[1]
        rows = torch.arange(length, device=embeds.device)
        distance = rows[:, None] - rows  # [S, S]: how many rows a column lies back
        angles = rows[:, None] / self.theta ** (torch.arange(0, self.dim, 2, device=rows.device) / self.dim)
        rotation = torch.cat([angles, angles], dim=-1)  # [S, d]
        keys, values, outputs = [], [], []
        for step in range(1, num_steps + 1):
            hidden = self.fc(torch.cat([embeds, features], dim=-1))
            query = self._rotate(self._heads(self.q_proj(hidden)), rotation)
            keys.append(self._rotate(self._heads(self.k_proj(hidden)), rotation).repeat_interleave(self.groups, 1))
            values.append(self._heads(self.v_proj(hidden)).repeat_interleave(self.groups, 1))
            # Columns at least k-1 rows back are step 1's, then one diagonal for each later step.
            masks = [distance >= step - 1, *(distance == step - j for j in range(2, step + 1))]
            scores = torch.full((), float("-inf"), device=rows.device)
            for mask, key in zip(masks, keys, strict=True):
                scores = torch.where(mask, query @ key.transpose(-1, -2) * self.dim**-0.5, scores)  # [B, heads, S, S]
            weights = scores.float().softmax(dim=-1).to(query.dtype)
            attended = sum((weights * mask) @ value for mask, value in zip(masks, values, strict=True))
            hidden = hidden + self.o_proj(attended.transpose(1, 2).flatten(2))
            normed = self._norm(hidden)
            hidden = hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
            outputs.append(hidden)
            features = F.pad(hidden.detach(), (0, 0, 1, -1))  # row r reads the output of row r-1
        return outputs

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def _rotate(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * rotation.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * rotation.sin().to(x.dtype)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.float().square().mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return self.norm * (x.float() * scale).to(x.dtype)


class ReferenceStep:
    """The training step. The target's weights are frozen.

    Args:
        target: the target, in its dtype.
        drafter: the drafter with the initial weights.
        num_steps (`int`): K.
        bf16 (`bool`): autocast, as published. False: float32 throughout.
        regression_weight (`float`), classification_weight (`float`): EAGLE's and HASS's are 1.0 and 0.1.
    """

    def __init__(
        self,
        target: Any,
        drafter: nn.Module,
        num_steps: int = 3,
        bf16: bool = True,
        regression_weight: float = 1.0,
        classification_weight: float = 0.1,
    ):
        self.target, self.num_steps, self.bf16 = target, num_steps, bf16
        self.weights = regression_weight, classification_weight
        self.drafter = ReferenceDrafter(drafter).to(next(drafter.parameters()).device)
        self.optimizer = torch.optim.AdamW(self.drafter.parameters(), lr=3e-5, betas=(0.9, 0.95))

    def features(self, ids: torch.LongTensor) -> torch.Tensor:
        """Ids `[B, S]` -> the target's last hidden states after its final norm `[B, S, H]`."""
        with torch.no_grad():
            return self.target.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def loss(self, ids: torch.LongTensor, response: torch.BoolTensor, features: torch.Tensor | None = None):
        """Ids and response mask `[B, S]` (whole rows, no padding), optionally the features `[B, S, H]` -> scalar."""
        features = self.features(ids) if features is None else features
        head = self.target.get_output_embeddings()
        with torch.no_grad():
            embeds = self.target.get_input_embeddings()(ids[:, 1:-1]).float()
        counted = response[:, 2:]  # row r predicts token r + 2 from token r + 1 and feature r
        goal = features[:, 1:-1][counted]  # [M, H]
        context = torch.autocast(ids.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        total = 0.0
        with context:
            with torch.no_grad():
                p = head(goal).float().softmax(dim=-1)  # [M, V]
            for step, hidden in enumerate(self.drafter(embeds, features[:, :-2].float(), self.num_steps)):
                # a row whose chain would begin before the sequence does not count
                counted_now = counted.clone()
                counted_now[:, :step] = False
                kept = counted_now[counted]  # [M]
                predicted = hidden[counted_now]
                log_q = head(predicted.to(head.weight.dtype)).float().log_softmax(dim=-1)
                classification = -(p[kept] * log_q).sum() if not kept.all() else -(p * log_q).sum()
                regression = F.smooth_l1_loss(predicted.float(), goal[kept].float(), reduction="none").mean(-1).sum()
                total = total + self.weights[0] * regression + self.weights[1] * classification
        return total / response.sum()

    def step(self, ids: torch.LongTensor, response: torch.BoolTensor, features: torch.Tensor | None = None) -> float:
        """Loss, gradients, clipping, AdamW."""
        loss = self.loss(ids, response, features)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
