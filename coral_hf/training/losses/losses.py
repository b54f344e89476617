"""Losses of drafter training: regression, classification, top-K and CSRA, on plain tensors.

The classification loss never holds the logits of a whole batch: it works through chunks of rows and computes the
gradient with respect to the drafter's output in the same pass, so that one chunk of fp32 logits exists at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


# logits of [M, H] features, optionally only for some rows of the head: [M, V] or [M, A]
LogitsFunction = Callable[..., torch.Tensor]


def default_chunk_size(device_type: str, vocab_size: int) -> int:
    """Rows of a chunk: on a CPU few, whose logits stay near its caches; elsewhere as many as make a product large."""
    return 256 if device_type == "cpu" else max(1, min(2048, 2**28 // vocab_size))


@dataclass
class ClassificationResult:
    """Result of [`chunked_classification_loss`], of each rollout step, or of one without the leading dimension.

    Args:
        loss (`torch.Tensor` of shape `[K]`): mean cross-entropy over the rows, differentiable in the drafter's output.
        topk_loss (`torch.Tensor` of shape `[K]`): mean top-K distillation term (0 when `top_k` is 0).
        match (`torch.BoolTensor` of shape `[K, M]`): drafter's argmax equals the target's, in valid rows.
    """

    loss: torch.Tensor
    topk_loss: torch.Tensor
    match: torch.Tensor


class _GradientFromForward(torch.autograd.Function):
    """K values whose gradient with respect to `hidden` `[K, M, H]` was already computed."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype)[:, None, None], None, None


class _ChunkMemory:
    """Tensors that every chunk fills anew: on a CPU, fresh memory for each costs more than a pass over it.

    Args:
        rows (`int`): rows of the largest chunk.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self.tensors: dict[str, torch.Tensor] = {}

    def like(self, name: str, values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An unfilled `[C, A]` of the shape of `values`, and its dtype unless one is given."""
        if name not in self.tensors:
            size = (self.rows, values.shape[1])
            self.tensors[name] = torch.empty(size, dtype=dtype or values.dtype, device=values.device)
        return self.tensors[name][: len(values)]

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values in a dtype; themselves where they have it."""
        return values if values.dtype == dtype else self.like(name, values, dtype).copy_(values)


def chunked_classification_loss(
    hidden: torch.Tensor,
    target_features: torch.Tensor,
    logits_fn: LogitsFunction,
    *,
    valid: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    logit_offsets: torch.Tensor | None = None,
    top_k: int = 0,
    top_k_weight: float = 0.0,
    chunk_size: int = 256,
) -> ClassificationResult:
    """Mean cross-entropy CE(p_target, q) of K steps over M rows, in chunks of rows (CORAL eq. 2; HASS eq. 5 for the top-K
    term).

    All steps predict the same rows, so that one pass of the target's head serves them.

    Args:
        hidden (`torch.Tensor` of shape `[K, M, H]`, or `[M, H]` for one step): the drafter's outputs.
        target_features (`torch.Tensor` of shape `[M, H]`): the target's features at the same positions.
        logits_fn: `TargetAdapter.logits`; frozen, its weights get no gradient.
        valid (`torch.BoolTensor` of shape `[K, M]`, *optional*): which rows of each step count; defaults to all.
        token_ids (`torch.LongTensor` of shape `[A]`, *optional*): compare p and q on these tokens only, both
            renormalised (cheaper; the default, the whole vocabulary, is exact).
        logit_offsets (`torch.Tensor` of shape `[A]`, *optional*): added to both logits; log(1 / sampling probability)
            lets sampled tokens stand for all those they were drawn from.
        top_k (`int`): tokens of HASS's top-K distillation term, -sum over the target's top K of p log q.
        top_k_weight (`float`): weight with which that term enters the gradient; 0 leaves it out.
        chunk_size (`int`): rows whose logits exist at one time.

    Returns:
        [`ClassificationResult`]; `loss` already carries `top_k_weight * topk_loss` in its gradient, not in its value.
    """
    if hidden.dim() == 2:
        options: dict[str, Any] = {"token_ids": token_ids, "logit_offsets": logit_offsets, "top_k": top_k}
        options |= {"top_k_weight": top_k_weight, "chunk_size": chunk_size}
        one = chunked_classification_loss(hidden[None], target_features, logits_fn, valid=valid, **options)
        return ClassificationResult(one.loss[0], one.topk_loss[0], one.match[0])
    steps, rows = hidden.shape[:2]
    if rows == 0:
        zero = hidden.sum(dim=(1, 2)) * 0.0
        return ClassificationResult(zero, zero.detach(), hidden.new_zeros(steps, 0, dtype=torch.bool))
    if valid is None:
        valid = torch.ones(steps, rows, dtype=torch.bool, device=hidden.device)
    # float64 inputs stay float64, so that gradients can be checked exactly
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kwargs = {} if token_ids is None else {"token_ids": token_ids}
    needs_gradient = hidden.requires_grad and torch.is_grad_enabled()
    source = hidden.detach()
    gradient: Any = torch.empty_like(source) if needs_gradient else None
    scale = valid.to(dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)  # [K, M]: what each row counts
    values = torch.zeros(2, steps, rows, dtype=dtype, device=hidden.device)  # cross-entropy and top-K term per row
    match = torch.empty(steps, rows, dtype=torch.bool, device=hidden.device)
    memory = _ChunkMemory(min(chunk_size, rows))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, chunk_size):
            part = slice(start, min(start + chunk_size, rows))
            with torch.no_grad():
                logits = memory.cast("logits", logits_fn(target_features[part], **kwargs), dtype)  # [C, A]
                # before the offsets, which lift a sampled token by all that it stands for
                target_best = logits.argmax(dim=-1)
                if logit_offsets is not None:
                    logits = logits + logit_offsets
                p = torch.softmax(logits, dim=-1, out=memory.like("p", logits))
                del logits
                if use_top_k := bool(top_k and top_k_weight):
                    mass, best_ids = p.topk(min(top_k, p.shape[-1]), dim=-1)
            for step in range(steps):
                with torch.set_grad_enabled(needs_gradient):
                    chunk = source[step, part].requires_grad_(needs_gradient)
                    raw = logits_fn(chunk, **kwargs)  # [C, A]
                with torch.no_grad():
                    logits = memory.cast("logits", raw.detach(), dtype)
                    match[step, part] = logits.argmax(dim=-1) == target_best
                    if logit_offsets is not None:
                        logits = logits + logit_offsets
                    q = memory.like("q", logits)
                    expected = torch.mul(p, logits, out=q).sum(dim=-1)
                    torch.softmax(logits, dim=-1, out=q)
                    # logsumexp from the largest q, which is exp(largest logit - logsumexp)
                    normaliser = logits.amax(dim=-1) - q.amax(dim=-1).log()
                    # sum_x p (logsumexp - logit) = -sum_x p log q, as p sums to 1
                    values[0, step, part] = normaliser - expected
                    if use_top_k:
                        log_q = logits.gather(-1, best_ids) - normaliser[:, None]
                        values[1, step, part] = -(mass * log_q).sum(dim=-1)
                    del logits
                    if needs_gradient:
                        # gradient of -sum_{x in K} p log q is (sum_K p) q - p 1[x in K]
                        if use_top_k:
                            q.mul_(1.0 + top_k_weight * mass.sum(dim=-1, keepdim=True))
                            q.scatter_add_(-1, best_ids, -top_k_weight * mass)
                        delta = memory.cast("delta", q.sub_(p), raw.dtype)
                if needs_gradient:
                    (rows_gradient,) = torch.autograd.grad(raw, chunk, delta)
                    gradient[step, part] = rows_gradient * scale[step, part, None]
                del raw
    if needs_gradient:
        gradient.masked_fill_(~valid[..., None], 0.0)  # outputs of other rows mean nothing, NaN included
    loss, topk_loss = (values.masked_fill_(~valid, 0.0) * scale).sum(dim=-1)
    if needs_gradient:
        loss = _GradientFromForward.apply(hidden, loss, gradient)
    return ClassificationResult(loss, topk_loss, match & valid)


def regression_loss(hidden: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
    """Mean over M rows of smooth L1 between drafter output and target feature, both `[M, H]` (EAGLE eq. 1)."""
    if hidden.shape[0] == 0:
        return hidden.sum() * 0.0
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.smooth_l1_loss(hidden.to(dtype), target_features.to(dtype))


@torch.no_grad()
def target_group_mass(
    target_features: torch.Tensor,
    logits_fn: LogitsFunction,
    group_mass: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunk_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the LM-head router is trained towards: P(g), the target's probability mass per group (CORAL section 3.2).

    Args:
        target_features (`torch.Tensor` of shape `[M, H]`).
        logits_fn: `TargetAdapter.logits`.
        group_mass: `LMHeadRouter.group_mass`, `[C, V]` -> `[C, G]`.
        chunk_size (`int`): rows whose fp32 logits exist at one time.

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
    """Mean cross-entropy of the router's `[M, G]` logits against the target's mass per group `[M, G]`; scalar."""
    log_probs = group_logits.to(mass.dtype).log_softmax(dim=-1)
    return -(mass * log_probs).sum() / max(len(mass), 1)


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

    Outputs of one position in different steps are positives of each other, every other position's outputs are
    negatives; each positive pair has a log-softmax term over all other views.

    Args:
        steps (`torch.Tensor` of shape `[K, M, H]`): drafter outputs, row m of every step predicting the same feature.
        valid (`torch.BoolTensor` of shape `[K, M]`): which (step, position) pairs exist.
        temperature (`float`): softmax temperature.
        target_features (`torch.Tensor` of shape `[M, H]`, *optional*): adds normalize(f) as one more, detached view.
        max_positions (`int`, *optional*): sample at most this many positions.
        generator (`torch.Generator`, *optional*): draws that sample.

    Returns:
        `torch.Tensor`: scalar; 0 (still differentiable) if no position has two views.

    Raises:
        ValueError: with one step and no target view, for which the loss is undefined.
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
    # a position with one view has no positive, but is a negative for the others
    positions = live.any(dim=0).nonzero().squeeze(-1)
    if max_positions is not None and positions.numel() > max_positions:
        # The draw happens where the generator lives, so that CPU and GPU runs agree.
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


__all__ = [
    "ClassificationResult",
    "chunked_classification_loss",
    "csra_loss",
    "default_chunk_size",
    "regression_loss",
    "router_loss",
    "target_group_mass",
]
