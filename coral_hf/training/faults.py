"""What stops a training before it spoils its weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


class StopOnNonFiniteGradient(TrainerCallback):
    """Raises before an update whose gradient is NaN or infinite, so that weights and checkpoints stay as they were.

    One such update turns every weight into NaN, and `Trainer` would go on with a logged loss of 0. Runs in float16
    are left to the gradient scaler, which skips such updates itself.

    Raises:
        FloatingPointError: naming the step, the batch and the last checkpoint.
    """

    def __init__(self) -> None:
        self.batch: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.fp16:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients or torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            return
        ids = self.batch.get("input_ids")
        rows = "" if ids is None else f" (last batch: {tuple(ids.shape)} ids, rows beginning {ids[:4, :8].tolist()})"
        saved = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        kept = "no checkpoint was written yet" if saved is None else f"the last checkpoint is {saved}"
        raise FloatingPointError(
            f"The gradient of step {state.global_step + 1} is not finite{rows}. The weights were not updated; {kept}. "
            "Resume with a lower learning_rate or in float32 (--bf16 false); on a GPU also try "
            "torch.backends.cuda.enable_cudnn_sdp(False)."
        )


__all__ = ["StopOnNonFiniteGradient"]
