"""The loss of the LM-head router, on the target's probability mass per group of tokens (CORAL section 3.2)."""

from collections.abc import Callable

import torch

from .chunked_pass import LogitsFunction


@torch.no_grad()
def target_group_mass(
    target_features: torch.Tensor,
    logits_fn: LogitsFunction,
    group_mass: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunk_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training target of the LM-head router: P(g), the target's probability mass per group (CORAL section 3.2).

    Args:
        target_features (`torch.Tensor` of shape `[M, H]`).
        logits_fn: `TargetAdapter.logits`.
        group_mass: `LMHeadRouter.group_mass`, `[C, V]` -> `[C, G]`.
        chunk_size (`int`): rows whose fp32 logits exist at the same time.

    Returns:
        `tuple`: P(g) `[M, G]` and the target's argmax token `[M]`.
    """
    masses, best = [], []
    with torch.autocast(target_features.device.type, enabled=False):
        # an empty batch is one empty chunk
        for features in target_features.split(chunk_size) or (target_features,):
            logits = logits_fn(features)
            p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)  # [C, V]
            masses.append(group_mass(p))
            best.append(p.argmax(dim=-1))
    return torch.cat(masses), torch.cat(best)


def router_loss(group_logits: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy between the router's `[M, G]` logits and the target's mass per group `[M, G]`; scalar."""
    log_probs = group_logits.to(mass.dtype).log_softmax(dim=-1)
    return -(mass * log_probs).sum() / max(len(mass), 1)


__all__ = ["router_loss", "target_group_mass"]
