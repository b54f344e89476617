"""Loads EAGLE-1/2, HASS and EAGLE-3 checkpoints, including those of vLLM, SGLang and speculators, as CORAL drafters."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..drafter.configuration_coral import CoralDraftConfig
from ..drafter.target_adapter import TargetAdapter
from .checkpoint_files import HOT_TOKENS_FILE, load_plain_pickle, read_config, read_tensors, resolve_folder
from .eagle_config import CORAL_KEY, check_supported, ignored_settings, layer_config, named_as, read_settings
from .schema import FLOAT_DTYPES, LAYER, check_tensors, layout_shapes


logger = logging.getLogger(__name__)
# An embedding copy may have been rounded to another 16-bit format than the target's.
COPY_RTOL, COPY_ATOL = 2**-7, 1e-6
# Older names of the norms of three features before fc, which SGLang also reads
_OLD_NORMS = {f"aux_norm_{name}.weight": f"fc_norm.{i}.weight" for i, name in enumerate(("low", "mid", "high"))}


def load_eagle(
    model_class: type,
    path_or_repo: str | os.PathLike,
    target: nn.Module,
    revision: str | None = None,
    **overrides: Any,
):
    """Loads an EAGLE-family checkpoint as a drafter for `target`, see `CoralDraftModel.from_eagle`.

    The embedding is always the target's. A copy in the checkpoint is compared with it and dropped, and so is a copy of the
    LM head. If an EAGLE-3 checkpoint has its own head, over all or a part of the vocabulary, the drafter keeps it.

    Args:
        model_class (`type`): [`CoralDraftModel`].
        path_or_repo (`str`): a folder or a Hub id.
        target (`PreTrainedModel`): the model that the checkpoint drafts for.
        revision (`str`, *optional*): revision of the Hub repository.
        **overrides: settings of [`CoralDraftConfig`] to use instead of the checkpoint's.

    Returns:
        [`CoralDraftModel`] in the checkpoint's dtype on the CPU.

    Raises:
        ValueError: if files, config or tensors are not those of a drafter for this target.
        OSError: if there is no such folder or repository.
    """
    folder = resolve_folder(path_or_repo, revision)
    raw = read_config(folder)
    check_supported(raw)
    for name, value in ignored_settings(raw).items():
        logger.warning(
            "%s=%r in the config of %s is ignored: a CORAL drafter attends to the whole text. It may accept less beyond that "
            "length.",
            name,
            value,
            folder,
        )
    stored = read_tensors(folder)
    tensors = canonical_names(stored)
    if tensors.get("d2t") is not None and tensors["d2t"].dtype == torch.int32:
        tensors["d2t"] = tensors["d2t"].long()  # engines read either
    adapter = TargetAdapter(target)
    shape = "eagle3" if _is_eagle3(raw, stored, tensors) else "eagle"
    of_target = CoralDraftConfig.from_target(target.config)
    fc_features = None
    if "fc.weight" in tensors and tensors["fc.weight"].ndim == 2:
        fc_features = tensors["fc.weight"].shape[1] // of_target.hidden_size
    settings = read_settings(raw, of_target, shape, fc_features, overrides)
    settings["target_embedding_scale"] = adapter.embedding_scale
    biased = [name for name in ("q_proj", "k_proj", "v_proj") if f"{LAYER}.self_attn.{name}.bias" in tensors]
    settings["attention_bias"] = bool(biased)
    bias = tensors.get("fc.bias")
    if bias is not None and raw.get("architectures") == ["LlamaForCausalLMEagle"] and not bias.any():
        # SGLang initialises a missing bias randomly, so its checkpoints contain zeros instead of no bias.
        del tensors["fc.bias"]
    settings["fc_bias"] = shape == "eagle" and "fc.bias" in tensors
    declared = raw.get("bias")
    if shape == "eagle" and declared is not None and bool(declared) != settings["fc_bias"]:
        raise ValueError(
            f"config.json says bias={declared}, but the weights have {'an' if bias is not None else 'no'} fc.bias: "
            "set it as in the weights, or fetch the checkpoint again."
        )
    settings["draft_vocab_size"] = _own_rows(raw, tensors, adapter, shape)
    hot_tokens = _hot_tokens(folder, of_target.vocab_size) if CORAL_KEY in raw and shape == "eagle" else None
    if hot_tokens is not None:
        settings["shortlist_size"] = hot_tokens.numel()
    config = CoralDraftConfig(**settings)
    adapter.check_drafter(config)
    _check(config, tensors, biased, f"{folder}{named_as(raw)}")
    _drop_copies(tensors, adapter, config)
    return _build(model_class, config, tensors, hot_tokens)


def canonical_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Normalises the names of engines and their versions: removes `model.`, and uses `layers.0` for EAGLE-3's `midlayer`.

    Raises:
        ValueError: if two tensors get the same name.
    """
    result: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        short = _OLD_NORMS.get(short, short)
        if short.startswith("midlayer."):
            short = LAYER + short.removeprefix("midlayer")
        if short.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that old Transformers versions saved; it follows from the config
        if short == f"{LAYER}.self_attn.o_proj.bias" and not tensor.any():
            continue
        if short in result:
            raise ValueError(f"The checkpoint contains {short} twice: as {origin[short]} and as {name}.")
        result[short], origin[short] = tensor, name
    return result


def _is_eagle3(raw: dict, stored: dict, tensors: dict) -> bool:
    """Whether a checkpoint is EAGLE-3. Its tensors decide first, because the architecture's name may be Llama's."""
    return (
        any(name in tensors for name in (f"{LAYER}.hidden_norm.weight", "d2t"))
        or any(name.removeprefix("model.").startswith("midlayer.") for name in stored)
        or raw.get("speculators_model_type") == "eagle3"
        or any("eagle3" in str(name).lower() for name in raw.get("architectures") or [])
    )


def _own_rows(raw: dict, tensors: dict[str, torch.Tensor], adapter: TargetAdapter, shape: str) -> int | None:
    """The number of rows of the checkpoint's own head, or None if it uses the target's. Drops an exact copy of that."""
    declared = raw.get("draft_vocab_size", layer_config(raw).get("draft_vocab_size"))
    if shape == "eagle":
        return None
    head, offsets = tensors.get("lm_head.weight"), tensors.get("d2t")
    if head is None:
        if offsets is not None or declared not in (None, adapter.vocab_size):
            raise ValueError(
                f"missing ['lm_head.weight']: the config says draft_vocab_size={declared}, the weights "
                f"{'have' if offsets is not None else 'lack'} d2t, but no head of that size is there."
            )
        return None
    rows = head.shape[0]
    if declared is not None and declared != rows:
        raise ValueError(f"lm_head.weight: expected {declared} rows (draft_vocab_size), found {rows}.")
    if rows != adapter.vocab_size and offsets is None:
        raise ValueError(
            f"missing ['d2t']: lm_head.weight has {rows} rows for a vocabulary of {adapter.vocab_size}, and nothing says "
            "which ids they score. Fetch the whole checkpoint, or load the target it was trained for."
        )
    if (offsets is None or not offsets.any()) and _same_rounded(head, adapter.head.weight):
        for name in ("lm_head.weight", "d2t", "t2d"):
            tensors.pop(name, None)
        return None
    return rows


def _same_rounded(found: torch.Tensor, own: torch.Tensor) -> bool:
    """Equal once both have the coarser of their dtypes."""
    if found.shape != own.shape or own.is_meta or not own.is_floating_point():
        return False
    own = own.detach().cpu()
    return torch.equal(found, own.to(found.dtype)) or torch.equal(found.to(own.dtype), own)


def _check(config: CoralDraftConfig, tensors: dict[str, torch.Tensor], biased: list[str], where: str) -> None:
    required, optional = layout_shapes(config)
    for setting, prefix in (("norm_before_fc", "input_norm."), ("fc_norm", "fc_norm.")):
        norms = sorted(name for name in tensors if name.startswith(prefix))
        if norms and config.shape == "eagle3" and not getattr(config, setting):
            # engines would ignore them or fail
            raise ValueError(
                f"{where} contains {norms}, but its config.json does not say {setting}: true. If the drafter was trained "
                f"with them, add that, or pass {setting}=True."
            )
    if config.shape == "eagle3" and config.num_target_features > 1:
        required["fc.weight"] = optional.pop("fc.weight")
    elif config.shape == "eagle3":
        del optional["fc.weight"]  # a single feature is as wide as the layer's input
    if biased:
        required |= {name: shape for name, shape in optional.items() if name.endswith("_proj.bias")}
    check_tensors(tensors, required, optional, f"{where} is not a drafter of the {config.shape} shape for this target")
    broken = sorted(
        name for name, tensor in tensors.items() if not tensor.is_meta and not torch.isfinite(tensor).all()
    )
    if broken:
        raise ValueError(
            f"{where} contains values that are not finite in {broken}: use another checkpoint of that training."
        )
    if "d2t" in tensors:
        _check_vocabulary(tensors["d2t"], tensors.get("t2d"), config.vocab_size)


def _check_vocabulary(offsets: torch.Tensor, mask: torch.Tensor | None, vocab_size: int) -> None:
    """Raises `ValueError` unless `d2t` names distinct ids of the target, and `t2d`, if present, marks the same ids."""
    ids = torch.arange(offsets.numel()) + offsets
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero().flatten().tolist()
    if outside:
        named = ", ".join(f"row {row}: {ids[row]}" for row in outside[:5])
        raise ValueError(
            f"d2t is out of range in {len(outside)} of {ids.numel()} rows: expected ids from 0 to {vocab_size - 1}, "
            f"found {named}. Its values are offsets, id - row."
        )
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"d2t names {ids.numel() - ids.unique().numel()} ids more than once; expected distinct ids.")
    if mask is not None:
        marked = mask.nonzero().flatten()
        if not torch.equal(marked, ids.sort().values):
            raise ValueError(f"t2d and d2t differ: t2d marks {marked.numel()} ids, not the {ids.numel()} of d2t.")


def _drop_copies(tensors: dict[str, torch.Tensor], adapter: TargetAdapter, config: CoralDraftConfig) -> None:
    """Removes copies of the target's embedding and, in the eagle shape, LM head; `ValueError` if they differ from it."""
    weights = {"embed_tokens.weight": adapter.embedding.weight}
    if config.shape == "eagle":
        weights["lm_head.weight"] = adapter.head.weight
    for name, own in weights.items():
        found = tensors.pop(name, None)
        # A quantised or offloaded target has no plain matrix to compare with.
        if found is None or own.is_meta or own.dtype not in (*FLOAT_DTYPES, torch.float64):
            continue
        own = own.detach().cpu().float()
        if not torch.allclose(found.float(), own, rtol=COPY_RTOL, atol=COPY_ATOL):
            gap = (found.float() - own).abs().max().item()
            raise ValueError(
                f"{name}: expected a copy of the target's, but it differs by up to {gap:.3g}. A CORAL drafter uses the "
                "target's own: load the target that this checkpoint was trained for."
            )


def _hot_tokens(folder: Path, vocab_size: int) -> torch.Tensor | None:
    """Ids of an exported hot-token list, `[n]`, which was the drafter's shortlist."""
    path = folder / HOT_TOKENS_FILE
    if not path.is_file():
        return None
    loaded = load_plain_pickle(path)
    ids = loaded.tolist() if isinstance(loaded, torch.Tensor) else loaded
    valid = isinstance(ids, list) and all(isinstance(token, int) and 0 <= token < vocab_size for token in ids)
    if not valid or not 0 < len(ids) < vocab_size or len(set(ids)) != len(ids):
        raise ValueError(
            f"{path}: expected a list of fewer than {vocab_size} distinct ids from 0 to {vocab_size - 1}, found "
            f"{str(ids)[:60]}. Export the drafter again, or delete that file."
        )
    return torch.tensor(ids)


def _build(model_class: type, config: CoralDraftConfig, tensors: dict[str, torch.Tensor], hot_tokens):
    dtype = torch.bfloat16
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if floating:
        dtype = floating.pop()
        for other in floating:  # mixed files: the dtype that represents all of them exactly
            dtype = torch.promote_types(dtype, other)
    state = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d", "lm_head.weight")}
    if config.draft_vocab_size is not None:
        ids = torch.arange(config.draft_vocab_size)
        state["draft_head.weight"] = tensors["lm_head.weight"]
        state["draft_head.token_ids"] = ids + tensors["d2t"] if "d2t" in tensors else ids
    if hot_tokens is not None:
        state["shortlist.token_ids"] = hot_tokens
    drafter = model_class(config).to(dtype).eval()
    drafter.load_state_dict(state, strict=True)
    drafter.config.dtype = dtype
    return drafter


__all__ = ["canonical_names", "load_eagle"]
