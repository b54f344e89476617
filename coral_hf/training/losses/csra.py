"""CSRA, Cross-Step Representation Alignment: the contrastive loss across rollout steps (CORAL section 3.1)."""

from typing import Any

import torch
from torch.nn import functional as F

from .loss_term import LossBatch, LossTerm


def csra_loss(
    steps: torch.Tensor,
    valid: torch.Tensor,
    *,
    temperature: float,
    target_features: torch.Tensor | None = None,
    max_positions: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Cross-Step Representation Alignment, the contrastive loss across rollout steps (CORAL section 3.1).

    Outputs of one position in different steps are positives of each other. Outputs of all other positions are negatives.
    Each positive pair has a log-softmax term over all other views.

    Args:
        steps (`torch.Tensor` of shape `[K, M, H]`): drafter outputs, row m of every step predicting the same feature.
        valid (`torch.BoolTensor` of shape `[K, M]`): which (step, position) pairs exist.
        temperature (`float`): softmax temperature.
        target_features (`torch.Tensor` of shape `[M, H]`, *optional*): adds normalize(f) as another, detached view.
        max_positions (`int`, *optional*): sample at most this many positions.
        generator (`torch.Generator`, *optional*): draws that sample.

    Returns:
        `torch.Tensor`: scalar; 0 (still differentiable) if no position has two views.

    Raises:
        ValueError: with one step and no target view, because the loss is then undefined.
    """
    views, live = steps, valid
    if target_features is not None:
        views = torch.cat([views, target_features.detach().to(views.dtype)[None]])
        live = torch.cat([live, torch.ones_like(live[:1])])
    if views.shape[0] < 2:
        raise ValueError(
            f"CSRA compares at least two views of a position, not {views.shape[0]}: use num_steps >= 2, set "
            "csra_include_target=True, or csra_weight=0."
        )
    if not (live.sum(dim=0) >= 2).any():
        return steps.sum() * 0.0
    # a position with one view has no positive, but it is a negative for the others
    positions = live.any(dim=0).nonzero().squeeze(-1)
    if max_positions is not None and positions.numel() > max_positions:
        # Drawn on the generator's device, so that CPU and GPU runs agree.
        device = generator.device if generator is not None else positions.device
        order = torch.randperm(positions.numel(), generator=generator, device=device)[:max_positions]
        positions = positions[order.to(positions.device)]
    dtype = torch.promote_types(views.dtype, torch.float32)
    views, live = views[:, positions].to(dtype), live[:, positions]
    count, size = views.shape[0], positions.numel()
    z = F.normalize(views, dim=-1).flatten(0, 1)  # [K m, H]
    live = live.flatten()  # [K m]
    position = torch.arange(size, device=z.device).repeat(count)  # [K m]
    similarity = z @ z.T / temperature  # [K m, K m]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = similarity.masked_fill(itself | ~live, float("-inf"))
    log_probability = similarity.log_softmax(dim=-1)
    positive = (position[:, None] == position) & ~itself & live & live[:, None]
    positives = positive.sum(-1)  # [K m]
    per_anchor = log_probability.masked_fill(~positive, 0.0).sum(-1) / positives.clamp(min=1)
    return -per_anchor.sum() / (positives > 0).sum().clamp(min=1)


def _of_batch(batch: LossBatch, args: Any) -> torch.Tensor:
    return csra_loss(
        batch.hidden,
        batch.valid,
        temperature=args.csra_temperature,
        target_features=batch.goals if args.csra_include_target else None,
        max_positions=args.csra_max_positions,
    )


TERM = LossTerm(
    "csra",
    "csra_weight",
    _of_batch,
    settings=("csra_temperature", "csra_include_target", "csra_max_positions"),
    across_steps=True,
)

__all__ = ["TERM", "csra_loss"]
