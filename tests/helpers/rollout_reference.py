"""Drafters of every variant, random rows for them, and the rollout in slow loops to compare with."""

import torch
from helpers.tiny_models import make_drafter, make_target, randomize

from coral_hf import CoralDraftModel


VARIANTS = {
    "eagle": {"shape": "eagle"},
    "eagle-fc-bias": {"shape": "eagle", "fc_bias": True, "attention_bias": True},
    "eagle3": {"shape": "eagle3"},
    "eagle3-raw-feedback": {"shape": "eagle3", "norm_output": False, "norm_before_residual": True},
    "eagle3-two-features": {"shape": "eagle3", "target_feature_layers": [1, -1]},
    "eagle3-norm-before-fc": {"shape": "eagle3", "target_feature_layers": [1, -1], "norm_before_fc": True},
    "eagle3-fc-norms": {"shape": "eagle3", "target_feature_layers": [1, 2, 3], "fc_norm": True, "norm_output": False},
}


def build(variant: str, dtype: torch.dtype = torch.float64) -> CoralDraftModel:
    return randomize(make_drafter(make_target(dtype=dtype), **VARIANTS[variant]), scale=0.1)


def random_inputs(
    drafter: CoralDraftModel, batch: int, length: int, seed: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size, dtype = drafter.config.hidden_size, drafter.dtype
    embeds = torch.randn(batch, length, size, generator=generator, dtype=torch.float64).to(dtype)
    width = size * drafter.config.num_target_features
    features = torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)
    return embeds, features


def rotate(x: torch.Tensor, position: int, drafter: CoralDraftModel) -> torch.Tensor:
    """RoPE of `[heads, d]` at one position, written out per pair (i, i + d/2)."""
    half = x.shape[-1] // 2
    angles = (torch.tensor(float(position)) * drafter.rotary_emb.inv_freq.float()).to(torch.float32)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def reference_projection(drafter, features):
    """Target features `[S, n * H]` -> what the layer reads `[S, H]`, by a sum over features."""
    config, size = drafter.config, drafter.config.hidden_size
    if config.num_target_features == 1:
        return features

    def normed(x, norm):
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    if config.norm_before_fc:
        features = normed(features, drafter.input_norm)
    projected = 0
    for index in range(config.num_target_features):
        columns = slice(index * size, (index + 1) * size)
        part = features[:, columns]
        part = normed(part, drafter.fc_norm[index]) if config.fc_norm else part
        projected = projected + part @ drafter.fc.weight[:, columns].T
    return projected


def reference_rollout(drafter, embeds, features, num_steps, documents, detach=True):
    """Every step with its full list of visible keys per row and -inf masks; loops over samples, steps and rows."""
    config, layer, attention = drafter.config, drafter.layer, drafter.layer.self_attn
    groups = config.num_attention_heads // config.num_key_value_heads
    all_outputs = []
    for sample in range(embeds.shape[0]):
        length = embeds.shape[1]
        document = documents[sample]
        feature = reference_projection(drafter, features[sample])  # [S, H]
        keys, values, outputs = {}, {}, []
        for step in range(1, num_steps + 1):
            if config.shape == "eagle":
                attention_input = residual = drafter.fc(torch.cat([embeds[sample], feature], -1))
            else:
                normed = layer.hidden_norm(feature)
                residual = normed if config.norm_before_residual else feature
                attention_input = torch.cat([layer.input_layernorm(embeds[sample]), normed], -1)
            queries = {}
            for row in range(length):
                heads = attention.q_proj(attention_input[row]).view(-1, config.head_dim)
                queries[row] = rotate(heads, row, drafter)
                heads = attention.k_proj(attention_input[row]).view(-1, config.head_dim)
                keys[step, row] = rotate(heads, row, drafter)
                values[step, row] = attention.v_proj(attention_input[row]).view(-1, config.head_dim)
            every = list(keys)  # all (step, row) so far
            stacked_keys = torch.stack([keys[pair] for pair in every]).repeat_interleave(
                groups, dim=1
            )  # [E, heads, d]
            stacked_values = torch.stack([values[pair] for pair in every]).repeat_interleave(groups, dim=1)
            merged = []
            for row in range(length):
                visible = {(1, c) for c in range(row - (step - 1) + 1) if document[c] == document[row]}
                visible |= {(j, row - (step - j)) for j in range(2, step + 1)}
                mask = torch.tensor([0.0 if pair in visible else float("-inf") for pair in every], dtype=embeds.dtype)
                scores = torch.einsum("hd,ehd->he", queries[row], stacked_keys) / config.head_dim**0.5 + mask
                merged.append(torch.einsum("he,ehd->hd", scores.softmax(-1), stacked_values).flatten())
            hidden = residual + attention.o_proj(torch.stack(merged))
            normed = layer.post_attention_layernorm(hidden)
            mlp = layer.mlp
            hidden = hidden + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
            output = drafter.norm(hidden)
            outputs.append(output)
            fed_back = output if config.norm_output else hidden
            fed_back = fed_back.detach() if detach else fed_back
            feature = torch.cat([torch.zeros_like(fed_back[:1]), fed_back[:-1]])
        all_outputs.append(torch.stack(outputs))
    return torch.stack(all_outputs, dim=1)  # [K, B, S, H]


def expected_valid(documents: torch.Tensor, step: int) -> torch.Tensor:
    valid = torch.zeros_like(documents, dtype=torch.bool)
    for sample in range(documents.shape[0]):
        for row in range(documents.shape[1]):
            chain = range(row - (step - 1), row + 1)
            valid[sample, row] = chain[0] >= 0 and len({int(documents[sample, r]) for r in chain}) == 1
    return valid
