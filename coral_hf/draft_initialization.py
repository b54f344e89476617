"""Starting weights of a drafter, scaled by its target's."""

from typing import Any

import torch
from torch import nn

from .configuration_coral import CoralDraftConfig, vocab_hash
from .target_adapter import TargetAdapter


# Size of the embedding's part in the fused input, relative to the feature's. Embeddings are an order of magnitude
# smaller than features (rms 0.14 against 1.95 on SmolLM2-135M), so that an ordinary initialisation hides the one token
# that the feature does not know yet. Measured there, after 100k tokens: 0.03 gives 19.5 % first-step accuracy, 0.25
# 23.8 %, 0.8 less again. Copying the target's last layer into the drafter's was worse than random (13.9 % against
# 18.6 % in the eagle3 shape).
EMBEDDING_SHARE = 0.25


def initialize_from_target(model_class: type, target: nn.Module, tokenizer: Any, overrides: dict[str, Any]):
    """Builds an untrained drafter for `target`, see `CoralDraftModel.from_target`.

    The layer starts random (standard deviation `initializer_range`). In the `eagle` shape `fc` starts as the identity
    on the feature plus a random projection of the embedding at a fixed share of its size; in the `eagle3` shape `norm`
    starts as the target's final norm, and `fc` (over several features) as the identity on the last listed one plus
    random projections of the others at that share.

    Raises:
        ValueError: if the target is not a Llama-shaped causal LM.
    """
    config = CoralDraftConfig.from_target(target.config, **overrides)
    adapter = TargetAdapter(target, config.target_feature_layers)
    if config.target_embedding_scale is None:
        config.target_embedding_scale = adapter.embedding_scale
    if tokenizer is not None:
        config.target_vocab_hash = vocab_hash(tokenizer)
    drafter = model_class(config).float()
    final_norm = _norm_weight(getattr(adapter.target.get_decoder(), "norm", None), config.hidden_size)
    size = config.hidden_size
    with torch.no_grad():
        if config.shape == "eagle":
            # Features are outputs of the final norm, so its weight tells their size.
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
                sizes = _feature_sizes(adapter)
                blocks = drafter.fc.weight.unflatten(1, (-1, size))  # [H, n, H]
                for index, rms in enumerate(sizes[:-1]):
                    blocks[:, index].normal_(0.0, EMBEDDING_SHARE * sizes[-1] / (rms * size**0.5))
                blocks[:, -1] = torch.eye(size)
    return drafter


def _feature_sizes(adapter: TargetAdapter) -> list[float]:
    """Typical rms of each feature layer: residual streams grow tenfold from the first layer to the last."""
    layers = adapter.feature_layers
    if adapter.device.type == "meta":
        return [1.0] * len(layers)
    ids = torch.arange(64, device=adapter.device)[None] % adapter.vocab_size
    features = adapter.compute_features(ids).float().unflatten(-1, (len(layers), -1))  # [1, S, n, H]
    # The median: the first position's residual stream is a hundred times larger in many models.
    rms = features.square().mean(dim=-1).sqrt()[0].median(dim=0).values
    return rms.clamp(min=1e-6).tolist()


def _norm_weight(norm: Any, size: int) -> torch.Tensor | None:
    """An RMSNorm's weight in our convention, `[H]` (Gemma stores weight - 1), or None if it has no such weight."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (size,) or weight.is_meta:
        return None
    with torch.no_grad():
        return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0].float().cpu()
