"""Synthetic EAGLE checkpoints in every published layout, and slow references of EAGLE-1's and EAGLE-3's forward.

The references recompute every row for every drafted token, head by head and row by row, in float64.
"""

import json
import math

import torch
from safetensors.torch import save_file


HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 48, 128
LLAMA = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def noise(*shape: int, seed: int, scale: float = 0.2) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_tensors(prefix: str, input_size: int, biases: bool = False) -> dict[str, torch.Tensor]:
    """Attention, post-attention norm and MLP of one decoder layer."""
    shapes = {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, input_size),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, input_size),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, input_size),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    if biases:
        shapes |= {name.replace("weight", "bias"): (shapes[name][0],) for name in list(shapes)[:3]}
    tensors = {name: noise(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    tensors["post_attention_layernorm.weight"] = 1 + noise(HIDDEN, seed=20)
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def eagle1_tensors(fc_bias: bool = False, biases: bool = False) -> dict[str, torch.Tensor]:
    tensors = {"fc.weight": noise(HIDDEN, 2 * HIDDEN, seed=30), **layer_tensors("layers.0", HIDDEN, biases)}
    if fc_bias:
        tensors["fc.bias"] = noise(HIDDEN, seed=31)
    return tensors


def eagle3_tensors(
    prefix: str = "midlayer", features: int = 3, draft_ids: torch.Tensor | None = None, norm: str | None = None
) -> dict:
    """With `draft_ids`, the checkpoint has its own head over these ids; `norm` is `norm_before_fc` or `fc_norm`."""
    tensors = {
        **layer_tensors(prefix, 2 * HIDDEN),
        f"{prefix}.input_layernorm.weight": 1 + noise(HIDDEN, seed=40),
        f"{prefix}.hidden_norm.weight": 1 + noise(HIDDEN, seed=41),
        "norm.weight": 1 + noise(HIDDEN, seed=42),
    }
    if features > 1:
        tensors["fc.weight"] = noise(HIDDEN, features * HIDDEN, seed=43)
    if norm == "norm_before_fc":
        tensors["input_norm.weight"] = 1 + noise(features * HIDDEN, seed=45)
    if norm == "fc_norm":
        tensors |= {f"fc_norm.{i}.weight": 1 + noise(HIDDEN, seed=46 + i) for i in range(features)}
    if draft_ids is not None:
        tensors["lm_head.weight"] = noise(len(draft_ids), HIDDEN, seed=44)
        tensors["d2t"] = draft_ids - torch.arange(len(draft_ids))
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, draft_ids, True)
    return tensors


def write(folder, config: dict, tensors: dict[str, torch.Tensor], layout: str = "safetensors"):
    """A checkpoint folder; `layout` is safetensors, bin, or one of them sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    suffix = "safetensors" if "safetensors" in layout else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = (lambda part, path: save_file(part, path)) if suffix == "safetensors" else torch.save
    if not layout.startswith("sharded"):
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    names, weight_map = sorted(tensors), {}
    for index, part in enumerate((names[::2], names[1::2])):
        shard = f"{stem}-{index + 1:05}-of-00002.{suffix}"
        save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# The published forwards, slowly ------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + LLAMA["rms_norm_eps"]).sqrt()


def rotate(vector: torch.Tensor, position: int, theta: float, factor: float) -> torch.Tensor:
    """RoPE of one head's vector: pairs (i, i + d/2) turn by position / factor * theta^(-2i/d)."""
    half, result = len(vector) // 2, vector.clone()
    for i in range(half):
        angle = position / factor * theta ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def attention(x: torch.Tensor, w: dict, theta: float, factor: float) -> torch.Tensor:
    """Causal grouped-query attention over rows `[S, input]`."""
    rows = len(x)

    def project(name, heads):
        out = x @ w[f"self_attn.{name}.weight"].T + w.get(f"self_attn.{name}.bias", 0)
        return out.view(rows, heads, HEAD_DIM)

    q, k, v = project("q_proj", HEADS), project("k_proj", KV_HEADS), project("v_proj", KV_HEADS)
    out = torch.zeros(rows, HEADS, HEAD_DIM, dtype=x.dtype)
    for head in range(HEADS):
        shared = head * KV_HEADS // HEADS
        keys = [rotate(k[row, shared], row, theta, factor) for row in range(rows)]
        for row in range(rows):
            query = rotate(q[row, head], row, theta, factor)
            scores = torch.stack([query @ key / math.sqrt(HEAD_DIM) for key in keys[: row + 1]])
            out[row, head] = scores.softmax(0) @ v[: row + 1, shared]
    return out.reshape(rows, -1) @ w["self_attn.o_proj.weight"].T


def mlp(x: torch.Tensor, w: dict) -> torch.Tensor:
    gate = x @ w["mlp.gate_proj.weight"].T
    return (gate * gate.sigmoid() * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def reference_logits(tensors, target, ids, features, theta=10000.0, factor=1.0, steps=3, **flags) -> list:
    """Logits of the last row in each of `steps` greedy drafting steps after a prompt.

    Args:
        tensors (`dict`): a checkpoint's, as published.
        target: gives embedding and head.
        ids (`[S + 1]`): x_0..x_S; row t reads e(x_{t+1}) and f_t.
        features (`[S, n * H]`): the target's f_0..f_{S-1}.

    Returns:
        `list`: per step, `(logits, ids that they score)`.
    """
    tensors = {name: tensor.double() for name, tensor in tensors.items() if name != "t2d"}
    prefix = "midlayer" if any(name.startswith("midlayer") for name in tensors) else "layers.0"
    w = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    embedding, head = target.get_input_embeddings().weight.double(), target.get_output_embeddings().weight.double()
    eagle3, ids, states = "hidden_norm.weight" in w, list(ids), features.double()
    scored = torch.arange(len(embedding))
    if "input_norm.weight" in tensors:
        states = rms_norm(states, tensors["input_norm.weight"])
    if "fc_norm.0.weight" in tensors:
        parts = enumerate(states.split(HIDDEN, -1))  # n of [S, H]
        states = torch.cat([rms_norm(part, tensors[f"fc_norm.{i}.weight"]) for i, part in parts], -1)
    if eagle3 and "fc.weight" in tensors:
        states = states @ tensors["fc.weight"].T
    if "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        scored = torch.arange(len(head)) + tensors["d2t"].long() if "d2t" in tensors else scored
    result = []
    for _ in range(steps):
        embeds = embedding[ids[1:]]
        if eagle3:
            normed = rms_norm(states, w["hidden_norm.weight"])
            residual = normed if flags.get("norm_before_residual") else states
            inputs = torch.cat([rms_norm(embeds, w["input_layernorm.weight"]), normed], -1)
        else:
            inputs = torch.cat([embeds, states], -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", 0)
            residual = inputs
        hidden = residual + attention(inputs, w, theta, factor)
        out = hidden + mlp(rms_norm(hidden, w["post_attention_layernorm.weight"]), w)
        for_head = rms_norm(out, tensors["norm.weight"]) if eagle3 else out
        logits = for_head[-1] @ head.T
        result.append((logits, scored))
        fed_back = for_head if flags.get("norm_output") else out
        ids.append(int(scored[logits.argmax()]))
        states = torch.cat([states, fed_back[-1:]])
    return result
