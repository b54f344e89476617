"""The loss of a low-rank head: its divergence from the full head's distribution on the drafter's outputs (EAGLE-4)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class _GradientsFromForward(torch.autograd.Function):
    """A value whose gradients with respect to weights were already computed."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, gradients: Sequence[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        return None, None, *(gradient * grad_output.to(gradient.dtype) for gradient in ctx.saved_tensors)


@torch.compiler.disable
def low_rank_loss(
    hidden: torch.Tensor,
    full_logits: Callable[[torch.Tensor], torch.Tensor],
    low_rank_logits: Callable[[torch.Tensor], torch.Tensor],
    weights: Sequence[torch.Tensor],
    candidates: int,
    *,
    chunk_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean forward KL, sum p (log p - log q), from the full head's distribution p to the low-rank head's q on the same outputs.

    The gradients are computed with the values, chunk by chunk, so that the logits of a whole batch are never stored.

    Args:
        hidden (`torch.Tensor` of shape `[M, H]`): the drafter's outputs, which get no gradient.
        full_logits, low_rank_logits (`Callable`): outputs `[C, H]` -> logits `[C, V]`.
        weights (`Sequence[torch.Tensor]`): the low-rank head's weights, which get gradients.
        candidates (`int`): number of its best ids that are scored exactly.
        chunk_size (`int`): rows whose logits exist at the same time.

    Returns:
        `tuple` of three scalars: the loss; the share of rows whose likeliest id by p is among the candidates; and the mean of p
        outside of them, the last two without a gradient.
    """
    hidden, rows = hidden.detach(), max(len(hidden), 1)
    trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    gradients = [torch.zeros_like(weight) for weight in weights] if trains else []
    sums: Any = 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        # an empty batch is one empty chunk
        for part in hidden.split(chunk_size) or (hidden,):
            with torch.no_grad():
                exact = full_logits(part)
                dtype = torch.promote_types(exact.dtype, torch.float32)
                log_p = exact.to(dtype).log_softmax(dim=-1)  # [C, V]
                best, p = log_p.argmax(dim=-1, keepdim=True), log_p.exp()
            with torch.set_grad_enabled(trains):
                estimate = low_rank_logits(part)
            with torch.no_grad():
                log_q = estimate.detach().to(dtype).log_softmax(dim=-1)
                kl = (p * (log_p - log_q)).sum()
                chosen = log_q.topk(candidates, dim=-1).indices
                found = (chosen == best).any(dim=-1).sum().to(dtype)
                covered = p.gather(-1, chosen).sum()
                sums = sums + torch.stack([kl, found, covered])
                delta = (log_q.exp_() - p) / rows
            if trains:
                steps = torch.autograd.grad(estimate, weights, delta.to(estimate.dtype))
                for gradient, step in zip(gradients, steps, strict=True):
                    gradient += step
    loss, recall, covered = (sums / rows).unbind()
    if trains:
        loss = _GradientsFromForward.apply(loss, gradients, *weights)
    return loss, recall, (1 - covered) if len(hidden) else covered


__all__ = ["low_rank_loss"]
