"""Stops a training before an update destroys its weights."""

from typing import Any

import torch
from transformers import TrainerCallback

from .run_folder import last_of_run


class StopOnNonFiniteGradient(TrainerCallback):
    """Raises before an update with a NaN or infinite loss or gradient, so that weights and checkpoints stay intact.

    One such update would turn every weight into NaN, and `Trainer` would continue with a logged loss of 0. In float16 runs,
    the gradient scaler skips such updates itself.

    Raises:
        FloatingPointError: with the step, the batch and the last checkpoint.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(self, inputs: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Records a batch of the current step and its loss."""
        self._batches.append((inputs["input_ids"], loss.detach()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        batches, self._batches = self._batches, []
        if args.fp16:
            return
        values = [loss.isfinite().all() for _, loss in batches]
        values += [parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None]
        if not values or all(bool(value) for value in _together(values)):
            return
        wrong = [index for index, (_, loss) in enumerate(batches) if not loss.isfinite().all()]
        if wrong:
            raise _error("loss", _batch(batches[wrong[0]][0], f"batch {wrong[0] + 1} of {len(batches)}"), args, state)
        # it is not known which batch made the sum of gradients invalid
        parts = [_batch(ids, f"batch {number}") for number, (ids, _) in enumerate(batches, start=1)]
        where = "".join(parts) if len(parts) < 2 else f"one of these {len(parts)} batches: {'; '.join(parts)}"
        raise _error("gradient", where, args, state)

    def check_loss(self, inputs: dict[str, torch.Tensor], loss: torch.Tensor, args: Any, state: Any) -> None:
        """Raises before the backward pass of a non-finite loss, because DeepSpeed's backward pass updates the weights."""
        if not args.fp16 and not bool(loss.isfinite().all()):
            raise _error("loss", _batch(inputs["input_ids"], f"batch {len(self._batches) + 1}"), args, state)


def _batch(ids: torch.Tensor, name: str) -> str:
    return f"{name}: {tuple(ids.shape)} ids, rows beginning {ids[:4, :8].tolist()}"


def _error(what: str, where: str, args: Any, state: Any) -> FloatingPointError:
    saved = last_of_run(args.output_dir)
    kept = "no checkpoint was written yet" if saved is None else f"the last checkpoint is {saved}"
    late = what == "gradient" and getattr(args, "deepspeed_plugin", None) is not None
    updated = "DeepSpeed has updated the weights with it" if late else "The weights were not updated"
    return FloatingPointError(
        f"The {what} of step {state.global_step + 1} is not finite{where and f' ({where})'}. {updated}; {kept}. Resume "
        "with a lower learning_rate or in float32 (--bf16 false); on a GPU also try "
        "torch.backends.cuda.enable_cudnn_sdp(False)."
    )


def _together(values: list[torch.Tensor]) -> list[bool]:
    """Moves scalars of one device in one transfer. A sharded gradient counts with its local part."""
    local = [value.to_local() if hasattr(value, "to_local") else value for value in values]
    return torch.stack([value.reshape(()) for value in local]).tolist()


__all__ = ["StopOnNonFiniteGradient"]
