"""Muon for matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on hidden matrices, AdamW on embeddings, heads and vectors.

    The same as `torch.optim.Muon`, but orthogonalised in float32. In bfloat16, as there, this would take ten times as long as a
    whole training step on CPUs without native bfloat16.

    Args:
        parameters (`Iterable`): (name, parameter).
        rate (`float`): Muon's learning rate, for a matrix times sqrt(max(1, rows / columns)).
        adamw_rate (`float`)
        weight_decay (`float`): of both.
        momentum (`float`): Muon's, Nesterov's form.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        rate: float,
        adamw_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        matrices, others = [], []
        for name, parameter in parameters:
            if parameter.requires_grad:
                hidden = parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))
                (matrices if hidden else others).append(parameter)
        self._adamw = torch.optim.AdamW(others, lr=adamw_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
        groups = [{"params": matrices, "lr": rate, "weight_decay": weight_decay, "momentum": momentum}]
        super().__init__(groups, {})
        self.param_groups += self._adamw.param_groups  # which a scheduler changes for both

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        self._adamw.step()
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            average = state.setdefault("average", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - group["momentum"])
            update = orthogonal(torch.lerp(parameter.grad, average, group["momentum"]))
            rate = group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)
        return loss


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix with equal singular values: five steps of Muon's quintic iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


__all__ = ["MuonWithAdamW", "orthogonal"]
