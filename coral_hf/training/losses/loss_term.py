"""A term of the loss, and the batch of rows that it is computed from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .chunked_pass import Comparison


@dataclass
class LossBatch:
    """The trained rows of a batch in all rollout steps. Every step predicts the same rows.

    Args:
        hidden (`torch.Tensor` of shape `[K, M, H]`): the drafter's outputs.
        goals (`torch.Tensor` of shape `[M, H]`): the target's features that the rows predict.
        valid (`torch.BoolTensor` of shape `[K, M]`): which rows of each step count.
        places (`torch.LongTensor` of shape `[M]`): indices of the rows in the flattened batch.
        compared (`dict`): the mean of each comparison that the terms need, `[K]`, see [`chunked_pass`].
    """

    hidden: torch.Tensor
    goals: torch.Tensor
    valid: torch.Tensor
    places: torch.Tensor
    compared: dict[Comparison, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # computed once, because every selection by a mask waits for the device
        steps, rows = self.valid.nonzero().unbind(-1)
        self._rows = rows.split(steps.bincount(minlength=len(self.valid)).tolist())

    @classmethod
    def of_rollout(
        cls, outputs: list[torch.Tensor], valid: list[torch.Tensor], goals: torch.Tensor, trained: torch.Tensor
    ) -> "LossBatch":
        """Selects the trained rows.

        Args:
            outputs (`list` of `torch.Tensor` of shape `[B, S, H]`): outputs of each step.
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
    """One term of the loss. `terms.TERMS` lists all of them.

    Args:
        name (`str`): name in the log and the learning curve. Terms of single steps get the step's number as a suffix.
        weight (`str`): the field of [`CoralTrainingArguments`] with its weight. At 0, the term is left out.
        function: a function of the [`LossBatch`] and the arguments. Returns a mean for each step `[K]`, or a scalar.
        settings (`tuple[str, ...]`): other fields that affect the term.
        comparisons (`tuple`): comparisons that it needs from the pass over the vocabulary, in `LossBatch.compared`.
        across_steps (`bool`): whether it compares steps, so that it is a scalar and needs K >= 2.
        always (`bool`): compute it for the log even at weight 0.
    """

    name: str
    weight: str
    function: Callable[[LossBatch, Any], torch.Tensor]
    settings: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    across_steps: bool = False
    always: bool = False


__all__ = ["LossBatch", "LossTerm"]
