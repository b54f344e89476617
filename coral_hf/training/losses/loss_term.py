"""What a term of the loss is, and the rows that it is computed from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .chunked_pass import Comparison


@dataclass
class LossBatch:
    """The trained rows of a batch, of all rollout steps beside each other: every step predicts the same ones.

    Args:
        hidden (`torch.Tensor` of shape `[K, M, H]`): the drafter's outputs.
        goals (`torch.Tensor` of shape `[M, H]`): the target's features that they predict.
        valid (`torch.BoolTensor` of shape `[K, M]`): which rows of each step count.
        places (`torch.LongTensor` of shape `[M]`): where the rows lie in the flattened batch.
        compared (`dict`): the mean of each comparison that the terms asked for, `[K]`, see [`chunked_pass`].
    """

    hidden: torch.Tensor
    goals: torch.Tensor
    valid: torch.Tensor
    places: torch.Tensor
    compared: dict[Comparison, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # found once, because every selection by a mask waits for the device
        steps, rows = self.valid.nonzero().unbind(-1)
        self._rows = rows.split(steps.bincount(minlength=len(self.valid)).tolist())

    @classmethod
    def of_rollout(
        cls, outputs: list[torch.Tensor], valid: list[torch.Tensor], goals: torch.Tensor, trained: torch.Tensor
    ) -> "LossBatch":
        """Picks the trained rows.

        Args:
            outputs (`list` of `torch.Tensor` of shape `[B, S, H]`): of each step.
            valid (`list` of `torch.BoolTensor` of shape `[B, S]`): rows of each step that have a chain before them.
            goals (`torch.Tensor` of shape `[B, S, H]`): the target's features.
            trained (`torch.BoolTensor` of shape `[B, S]`): rows that predict a response token.
        """
        places = trained.flatten().nonzero().squeeze(-1)  # [M]
        hidden = torch.stack([step.flatten(0, 1).index_select(0, places) for step in outputs])  # [K, M, H]
        rows = torch.stack([step.flatten().index_select(0, places) for step in valid])  # [K, M]
        return cls(hidden, goals.flatten(0, 1).index_select(0, places), rows, places)

    def steps(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Outputs and goals of the rows that count in each step, both `[M_k, H]`."""
        for hidden, rows in zip(self.hidden, self._rows, strict=True):
            yield hidden.index_select(0, rows), self.goals.index_select(0, rows)


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss; `terms.TERMS` lists all of them.

    Args:
        name (`str`): in the log and the learning curve, where a term of single steps has the step's number after it.
        weight (`str`): the field of [`CoralTrainingArguments`] that weighs it; at 0 it is left out.
        function: of the [`LossBatch`] and the arguments; returns a mean for each step `[K]`, or a scalar.
        settings (`tuple[str, ...]`): further fields that decide what it computes.
        comparisons (`tuple`): what it needs of the pass over the vocabulary; found in `LossBatch.compared`.
        across_steps (`bool`): it compares steps, so that it is a scalar and needs K >= 2.
        always (`bool`): computed for the log at weight 0 too.
    """

    name: str
    weight: str
    function: Callable[[LossBatch, Any], torch.Tensor]
    settings: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    across_steps: bool = False
    always: bool = False


__all__ = ["LossBatch", "LossTerm"]
