"""HeadTrainer: the common part of the trainers of a part of a draft head. The drafter is frozen."""

from typing import Any, ClassVar

import torch

from .inputs import resolve_drafter
from .report.metrics import WeightedMeans
from .trainer import CoralTrainer


class HeadTrainer(CoralTrainer):
    """Trains only a part of a drafter's head. Uses the outputs of all K rollout steps, as in drafting.

    Args:
        the same as for [`CoralTrainer`].

    Raises:
        ValueError: if the drafter has no such part, or `args.stage` is not this trainer's.
    """

    part: ClassVar[str]  # name of the part of the head
    remedy: ClassVar[str]  # for a drafter without this part

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        model = resolve_drafter(model)
        if getattr(model, self.stage) is None:
            raise ValueError(
                f"stage={self.stage!r} trains the {self.part} of a trained drafter, and this one has none: call {self.remedy} first."
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError(f"stage={self.stage!r} trains a small {self.part} as it is: leave peft_config out.")
        super().__init__(model, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_steps = self.args.rollout_steps_at(self.state.global_step / max(self.state.max_steps, 1))
        loss, rows, count, metrics, outputs = self._head_terms(model, inputs, num_steps)
        if model.training:
            self._metrics.add({name: (value, rows) for name, value in metrics.items()})
        # A row has the same weight in every batch, although the number of later steps' rows differs.
        items = max(count, 1) if num_items_in_batch is None else num_items_in_batch
        loss = self._finish_loss(loss * rows / (num_steps * items), model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _head_terms(
        self, model: Any, inputs: dict[str, torch.Tensor], num_steps: int
    ) -> tuple[torch.Tensor, int, int, dict[str, torch.Tensor], Any]:
        """Mean loss over all steps' rows, their number, the number of trained rows of a step, measures over all steps' rows,
        and the outputs."""
        raise NotImplementedError

    def _start_evaluation(self) -> Any:
        return WeightedMeans(torch.float64)

    def _evaluate_batch(self, totals: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        loss, rows, _, metrics, _ = self._head_terms(model, inputs, self.args.eval_chain_depth)
        totals.add({name: (value, rows) for name, value in {"loss": loss, **metrics}.items()})


__all__ = ["HeadTrainer"]
