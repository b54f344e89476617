"""Writes a CORAL drafter as the GGUF file that llama.cpp's EAGLE-3 loader reads.

The layout is that of `src/models/eagle3.cpp` in llama.cpp of October 2026 (xllamacpp 2026.10.11549 contains it). Older
releases name the feature layers `eagle3.extract_layers` and reject the file.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ..drafter.configuration_coral import FEATURE_LAYER_LAST, CoralDraftConfig
from .checkpoint_files import check_new_folder, staged_folder
from .engine_export import EngineExport
from .serving import export_notes, llama_server_command


GGUF_FILE = "drafter.gguf"
ARCHITECTURE = "eagle3"
FEATURES = 3
# RoPE types that divide each frequency by a constant, for which GGUF has a tensor of factors
ROPE_TYPES = ("default", "linear", "llama3")
ROPE_FACTORS = "rope_freqs.weight"

_LAYER = {
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# A drafter's tensor -> llama.cpp's
NAMES = {
    "fc.weight": "fc.weight",
    "input_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "draft_head.weight": "output.weight",
    "draft_head.token_ids": "d2t",
    **{f"layers.0.{ours}.weight": f"blk.0.{theirs}.weight" for ours, theirs in _LAYER.items()},
}


def export_gguf(drafter: Any, folder: str | os.PathLike, target_gguf: str | os.PathLike) -> EngineExport:
    """Writes the GGUF file with which llama.cpp drafts for a target's GGUF file (`--spec-type draft-eagle3`).

    The target's embedding and LM head stay in its own file, in its precision. The target's tokenizer is copied. Matrices keep the
    drafter's dtype, and norms become float32.

    Args:
        drafter ([`CoralDraftModel`]): a drafter of the `eagle3` shape over three layers' inputs, with `norm_output=False`.
        folder (`str` or `os.PathLike`): a new or empty folder for `drafter.gguf`.
        target_gguf (`str` or `os.PathLike`): the target's GGUF file, or the first part of a split one.

    Returns:
        [`EngineExport`]

    Raises:
        ValueError: if llama.cpp cannot express the drafter, the target's file is damaged or of another target, or the folder
            is not empty. Nothing is written.
        ImportError: if the `gguf` package is missing.
    """
    check_new_folder(folder)
    config = drafter.config
    if problems := _obstacles(config):
        raise ValueError(f"llama.cpp cannot express this drafter: {'; '.join(problems)}.")
    gguf = _require_gguf()
    tokenizer = _tokenizer(gguf, Path(target_gguf), config)
    tensors = _tensors(drafter)
    with staged_folder(folder) as scratch:
        writer = gguf.GGUFWriter(scratch / GGUF_FILE, ARCHITECTURE)
        _write_settings(writer, config)
        for name, field in tokenizer.items():
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype
                writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    file = Path(folder) / GGUF_FILE
    return EngineExport(
        Path(folder), llama_server_command(config, file, str(target_gguf)), export_notes(config, "gguf", False)
    )


def _obstacles(config: CoralDraftConfig) -> list[str]:
    """All properties of a drafter that llama.cpp does not support."""
    if config.shape != "eagle3":
        return [f"it has no {config.shape} shape; use --to vllm or sglang"]
    problems = []
    layers, rope = config.target_feature_layers, config.rope_parameters
    if len(layers) != FEATURES or FEATURE_LAYER_LAST in layers:
        problems.append(f"target_feature_layers={layers}: it reads the inputs of exactly {FEATURES} layers")
    if config.norm_output:
        problems.append("norm_output=True, it feeds the state before the norm back")
    if config.fc_norm:
        problems.append("fc_norm=True, it has one norm over all features (norm_before_fc) and none for each")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act={config.hidden_act!r}, its MLP is gated by silu")
    if config.attention_bias:
        problems.append("attention_bias=True, its q/k/v projections have no bias")
    if (kind := rope.get("rope_type", "default")) not in ROPE_TYPES:
        problems.append(f"rope_type={kind!r}, only {', '.join(ROPE_TYPES)} are written")
    if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={part}, it rotates whole heads")
    return problems


def _require_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "--to gguf needs the `gguf` package; install the extra: pip install 'coral-hf[demo]'"
        ) from error
    return gguf


def _tokenizer(gguf: Any, path: Path, config: CoralDraftConfig) -> dict[str, Any]:
    """The tokenizer's fields of the target's file, after checking that its sizes fit the drafter."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the target's GGUF file, whose tokenizer is copied.")
    try:
        fields = gguf.GGUFReader(path).fields
        kind = fields["general.architecture"].contents()
        found = {
            "hidden_size": fields[f"{kind}.embedding_length"].contents(),
            "vocab_size": len(fields["tokenizer.ggml.tokens"].data),
            "num_hidden_layers": fields[f"{kind}.block_count"].contents(),
        }
        if extra := fields.get(f"{kind}.nextn_predict_layers"):  # layers that predict ahead, counted as blocks
            found["num_hidden_layers"] -= extra.contents()
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged or not the GGUF file of a language model ({error}).") from error
    wanted = {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.target_num_hidden_layers or found["num_hidden_layers"],
    }
    if differing := [f"{name}={found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]:
        raise ValueError(f"{path} is not of the target that the drafter was made for: {'; '.join(differing)}.")
    return {name: field for name, field in fields.items() if name.startswith("tokenizer.ggml.")}


def _write_settings(writer: Any, config: CoralDraftConfig) -> None:
    writer.add_type("model")
    if config.target_name_or_path:
        writer.add_name(f"CORAL drafter for {config.target_name_or_path}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    # the `gguf` package does not support EAGLE-3 yet; a layer's number means its input, as in CORAL
    writer.add_array(f"{ARCHITECTURE}.target_layers", config.target_feature_layers)
    writer.add_uint32(f"{ARCHITECTURE}.target_hidden_size", config.hidden_size)
    writer.add_bool(f"{ARCHITECTURE}.norm_before_residual", config.norm_before_residual)
    writer.add_bool(f"{ARCHITECTURE}.norm_before_fc", config.norm_before_fc)


def _tensors(drafter: Any) -> dict[str, torch.Tensor]:
    """The drafter's weights under llama.cpp's names."""
    config, tensors = drafter.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in drafter.state_dict().items():
        if name.startswith(("router.", "shortlist.", "low_rank.")):
            continue
        tensor = tensor.detach().cpu()
        if (projection := name.split(".")[-2]) in heads:
            tensor = _adjacent_pairs(tensor, heads[projection])
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor = tensor.float()  # llama.cpp only multiplies by norms in float32
        tensors[NAMES[name]] = tensor.contiguous()
    own = drafter.draft_head
    if own is not None and torch.equal(own.token_ids.cpu(), torch.arange(config.vocab_size)):
        del tensors["d2t"]
    if config.rope_parameters.get("rope_type", "default") != "default":
        tensors[ROPE_FACTORS] = _rope_factors(drafter)
    return tensors


def _adjacent_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[heads * d, 2H]` in llama.cpp's order: a head's rows i and i + d/2, which RoPE rotates together, are adjacent."""
    rows, width = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, width)  # [heads, 2, d/2, 2H]
    return halves.transpose(1, 2).reshape(rows, width)


def _rope_factors(drafter: Any) -> torch.Tensor:
    """The divisors of RoPE's default frequencies, `[d/2]`."""
    found = drafter.rotary_emb.inv_freq.detach().cpu().float()
    exponents = torch.arange(0, 2 * len(found), 2, dtype=torch.float32) / (2 * len(found))
    return drafter.config.rope_parameters["rope_theta"] ** -exponents / found


__all__ = ["GGUF_FILE", "export_gguf"]
