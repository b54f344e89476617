"""Initial weights of a drafter, scaled by its target's, and parts of a draft head that are added later."""

import os
from typing import Any

import torch
from transformers import AutoTokenizer

from .configuration_coral import CoralDraftConfig, vocab_hash
from .draft_head import FrequencyShortlist, LMHeadRouter, LowRankHead
from .target_adapter import TargetAdapter, resolve_target


# Size of the embedding's part in the fused input, relative to the feature's. Embeddings are an order of magnitude
# smaller than features (rms 0.14 against 1.95 on SmolLM2-135M), so that an ordinary initialisation hides the one token
# that the feature does not know yet. Measured there, after 100k tokens: 0.03 gives 19.5 % first-step accuracy, 0.25
# 23.8 %, 0.8 less again. Copying the target's last layer into the drafter's was worse than random (13.9 % against
# 18.6 % in the eagle3 shape).
EMBEDDING_SHARE = 0.25


def initialize_from_target(model_class: type, target: Any, tokenizer: Any, overrides: dict[str, Any]):
    """Builds an untrained drafter for `target`, see `CoralDraftModel.from_target`.

    The layer is initialised randomly (standard deviation `initializer_range`). In the `eagle` shape, `fc` starts as the
    identity on the feature, plus a random projection of the embedding at a fixed share of its size. In the `eagle3` shape,
    `norm` starts as the target's final norm. `fc` over several features starts as the identity on the last listed one, plus
    random projections of the others at that share. Features that are normed before `fc` leave it at size one.

    Raises:
        ValueError: if the target is not a Llama-shaped causal LM, or computes its logits in an unknown way.
    """
    name, target = target, resolve_target(target)
    if tokenizer is None and isinstance(name, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(name)
    config = CoralDraftConfig.from_target(target.config, **overrides)
    adapter = TargetAdapter(target, config.target_feature_layers)
    adapter.check_identity()
    if config.target_embedding_scale is None:
        config.target_embedding_scale = adapter.embedding_scale
    if tokenizer is not None:
        config.target_vocab_hash = vocab_hash(tokenizer)
    drafter = model_class(config).float()
    final_norm = _norm_weight(getattr(adapter.target.get_decoder(), "norm", None), config.hidden_size)
    size = config.hidden_size
    with torch.no_grad():
        if config.shape == "eagle":
            # Features are outputs of the final norm, so its weight gives their size.
            feature_rms = 1.0 if final_norm is None else final_norm.square().mean().sqrt().item()
            sample = torch.arange(min(4096, config.vocab_size), device=adapter.device)
            embedding_rms = adapter.embed(sample).float().square().mean().sqrt().item()
            std = EMBEDDING_SHARE * feature_rms / (max(embedding_rms, 1e-6) * size**0.5)
            drafter.fc.weight[:, :size].normal_(0.0, std)
            drafter.fc.weight[:, size:] = torch.eye(size)
        else:
            if final_norm is not None:
                drafter.norm.weight.copy_(final_norm)
            if config.num_target_features > 1:
                sizes = _feature_sizes(adapter, config)
                # Normed features come out at size one; where all are normed together, the last one may be small beside the
                # others. Measured on SmolLM2-135M, features 3, 15, 26 and -1 under one norm, one seed, 96 conversations:
                # evaluation loss 8.2; at the raw feature's size (2.4) 8.8, at what the identity leaves (0.23) 11.4.
                kept = 1.0 if config.norm_before_fc else sizes[-1]
                blocks = drafter.fc.weight.unflatten(1, (-1, size))  # [H, n, H]
                for index, rms in enumerate(sizes[:-1]):
                    blocks[:, index].normal_(0.0, EMBEDDING_SHARE * kept / (rms * size**0.5))
                blocks[:, -1] = torch.eye(size) * (kept / sizes[-1])
    if drafter.low_rank is not None:
        _start_from_svd(drafter.low_rank, adapter)
    return drafter


def _feature_sizes(adapter: TargetAdapter, config: CoralDraftConfig) -> list[float]:
    """Typical RMS of each input feature of `fc`, because residual streams grow tenfold from the first layer to the last."""
    layers = adapter.feature_layers
    if config.fc_norm or adapter.device.type == "meta":
        return [1.0] * len(layers)
    ids = torch.arange(64, device=adapter.device)[None] % adapter.vocab_size
    features = adapter.compute_features(ids).float().unflatten(-1, (len(layers), -1))  # [1, S, n, H]
    squares = features.square().mean(dim=-1)[0]  # [S, n]
    if config.norm_before_fc:
        squares = squares / (squares.mean(dim=-1, keepdim=True) + config.rms_norm_eps)
    # The median, because the first position's residual stream is a hundred times larger in many models.
    rms = squares.sqrt().median(dim=0).values
    return rms.clamp(min=1e-6).tolist()


def _norm_weight(norm: Any, size: int) -> torch.Tensor | None:
    """An RMSNorm's weight in Llama's convention, `[H]` (Gemma stores weight - 1), or None if it has none."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (size,) or weight.is_meta:
        return None
    with torch.no_grad():
        return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0].float().cpu()


def _with_settings(drafter: Any, **settings: Any) -> CoralDraftConfig:
    """A drafter's config with other settings, as a new one: it refuses what does not fit."""
    kept = {key: value for key, value in drafter.config.to_dict().items() if key != "model_type"}
    return type(drafter.config)(**{**kept, **settings})


def new_router(drafter: Any, num_groups: int, active_groups: int | None, grouping: str) -> LMHeadRouter:
    """Gives a drafter a router, see `CoralDraftModel.add_router`."""
    config = _with_settings(
        drafter, router_groups=num_groups, router_active_groups=active_groups, router_grouping=grouping
    )
    for name in ("router_groups", "router_active_groups", "router_hidden_size", "router_grouping"):
        setattr(drafter.config, name, getattr(config, name))
    drafter.router = LMHeadRouter.from_config(config).to(device=drafter.device, dtype=drafter.dtype)
    return drafter.router


def new_shortlist(drafter: Any, counts: torch.Tensor, size: int) -> FrequencyShortlist:
    """Gives a drafter a shortlist, see `CoralDraftModel.add_shortlist`."""
    vocab_size = drafter.config.vocab_size
    if not isinstance(counts, torch.Tensor) or counts.shape != (vocab_size,):
        found = f"shape {tuple(counts.shape)}" if isinstance(counts, torch.Tensor) else f"type {type(counts).__name__}"
        raise ValueError(f"counts of {found} must be a tensor of one count for each of the {vocab_size} ids.")
    if type(size) is not int or not 0 < size < vocab_size:
        raise ValueError(f"size={size!r} must be an integer of at least 1 and below the {vocab_size} ids.")
    if drafter.draft_head is not None:
        own = drafter.config.draft_vocab_size
        raise ValueError(f"draft_vocab_size={own}: a drafter with a head of its own takes no shortlist.")
    drafter.config.shortlist_size = size
    drafter.shortlist = FrequencyShortlist(size).count(counts.cpu()).to(drafter.device)
    return drafter.shortlist


def new_low_rank_head(drafter: Any, target: Any, rank: int, candidates: int | None) -> LowRankHead:
    """Gives a drafter a low-rank head, see `CoralDraftModel.add_low_rank_head`."""
    if type(rank) is not int or rank < 1:  # 0 in a config: none
        raise ValueError(f"rank={rank!r} must be an integer from 1 to the hidden size {drafter.config.hidden_size}.")
    adapter = TargetAdapter(resolve_target(target))
    adapter.check_drafter(drafter.config)
    if adapter.head.weight.is_meta:
        raise ValueError(
            f"The LM head of {type(adapter.target).__name__} has no values here (it is offloaded, or on the meta device): load the "
            "target whole, and add the low-rank head again."
        )
    config = _with_settings(drafter, low_rank_size=rank, low_rank_candidates=candidates)
    head = LowRankHead.from_config(config)
    _start_from_svd(head, adapter)
    for name in ("low_rank_size", "low_rank_candidates"):
        setattr(drafter.config, name, getattr(config, name))
    drafter.low_rank = head.to(device=drafter.device, dtype=drafter.dtype)
    return drafter.low_rank


@torch.no_grad()
def _start_from_svd(head: LowRankHead, adapter: TargetAdapter) -> None:
    adapter.check_rows()
    if adapter.head.weight.is_meta:
        return
    down, up = truncated_svd(adapter.head.weight.detach(), head.down_proj.out_features)
    head.down_proj.weight.copy_(down)
    head.up_proj.weight.copy_(up)


def truncated_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best product of two matrices of rank r to a matrix (Eckart and Young), each with the roots of the singular values.

    The right singular vectors are eigenvectors of the small `weight.T @ weight`: no decomposition of all V rows is needed.

    Args:
        weight (`torch.Tensor` of shape `[V, H]`)
        rank (`int`): r, at most H.

    Returns:
        `tuple`: `down` `[r, H]` and `up` `[V, r]` in float64 on the CPU, whose product `up @ down` is the approximation.
    """
    parts = weight.cpu().split(8192)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in parts:
        gram += rows.double().T @ rows.double()
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    basis = vectors[:, -rank:].flip(1)  # [H, r]
    roots = squares[-rank:].flip(0).clamp(min=1e-24).sqrt().sqrt()  # a head may have a smaller rank itself
    up = torch.cat([rows.double() @ (basis / roots) for rows in parts])
    return basis.T * roots[:, None], up


__all__ = ["initialize_from_target", "new_low_rank_head", "new_router", "new_shortlist", "truncated_svd"]
