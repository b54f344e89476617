"""Logged values of a training: weighted means over batches and processes, and the number of trained tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback


class WeightedMeans:
    """Means of named values, weighted by their numbers of rows, so that small batches count less.

    Args:
        dtype (`torch.dtype`): dtype of the sums.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._sums: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, tuple[torch.Tensor, torch.Tensor | int]]) -> None:
        """Adds `{name: (mean, weight)}` of one batch, scalars."""
        for name, (mean, weight) in values.items():
            weight = torch.as_tensor(weight, dtype=self._dtype, device=mean.device)
            pair = torch.stack([mean.detach().to(self._dtype) * weight, weight])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def drain(self, accelerator: Any) -> dict[str, float]:
        """The means over all values that were added since the last call, over all processes."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])  # [N, 2]
        self._sums = {}
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        means = (sums[:, 0] / sums[:, 1].clamp(min=1e-9)).tolist()
        return dict(zip(names, means, strict=True))


class CountTokens(TrainerCallback):
    """Counts the response tokens of completed updates.

    Batches that were only read do not count. A checkpoint may be written between reading and updating, and with
    `auto_find_batch_size` training restarts after running out of memory.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.start = 0  # tokens at the start of the current training
        self._read = 0

    def read(self, count: int) -> None:
        """Records the tokens of the next update, over all processes."""
        self._read = count

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen, self._read = self.start, 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen, self._read = self.seen + self._read, 0


def chain_length(values: dict[str, float]) -> float | None:
    """Expected acceptance length (with the bonus token) of a chain, from conditional rates `acceptance_1`, ...

    Returns:
        `float`: 1 + a_1 + a_1 a_2 + ..., or None without rates.
    """
    if "acceptance_1" not in values:
        return None
    length, reached, step = 1.0, 1.0, 1
    while (rate := values.get(f"acceptance_{step}")) is not None:
        reached *= rate
        length += reached
        step += 1
    return length


__all__ = ["CountTokens", "WeightedMeans", "chain_length"]
