"""Settings of Transformers' trainer that a drafter's training has no use for: refused, because they would do nothing."""

from typing import Any


_EVALUATION = "an evaluation simulates chains and sums up as it goes, without predictions to collect: read what trainer.evaluate() returns"
# name: (value at which it asks for nothing, why it is refused and what to do)
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the losses compare with the target's whole distribution, not with labels"),
    "neftune_noise_alpha": (None, "a drafter has no embedding of its own; feature_noise disturbs what it reads"),
    "include_num_input_tokens_seen": ("no", "the log counts response_tokens, which are what is trained on"),
    "bf16_full_eval": (False, "an evaluation computes as the training does: set bf16=True for both"),
    "fp16_full_eval": (False, "an evaluation computes as the training does: set fp16=True for both"),
    "prediction_loss_only": (False, _EVALUATION),
    "eval_accumulation_steps": (None, _EVALUATION),
    "include_for_metrics": ([], _EVALUATION),
    "batch_eval_metrics": (False, _EVALUATION),
    "eval_do_concat_batches": (True, _EVALUATION),
    "eval_use_gather_object": (False, _EVALUATION),
    "label_names": (None, "what a drafter is trained on is decided by response masks"),
    "length_column_name": ("length", "lengths are those of the token ids"),
}
PARAMETERS = {
    "model_init": "give the drafter itself as model, and seed before it is made (transformers.set_seed)",
    "compute_loss_func": "the losses and their weights are in CoralTrainingArguments; others need a subclass's compute_loss",
    "compute_metrics": _EVALUATION,
    "preprocess_logits_for_metrics": _EVALUATION,
}


def check_arguments(args: Any) -> None:
    """Raises `ValueError` if training arguments ask for something that a drafter's training does not do."""
    for name, (unused, remedy) in ARGUMENTS.items():
        if (value := getattr(args, name, unused)) != unused:
            raise ValueError(f"{name}={value!r} would do nothing: {remedy}. Leave it out.")
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"{name}={getattr(args, name)!r}: the reentrant form needs inputs with a gradient, and a drafter's have none. "
                "Leave use_reentrant out."
            )


def check_parameters(given: dict[str, Any]) -> None:
    """Raises `ValueError` if a trainer is given a parameter of `Trainer` that it would not call."""
    for name, remedy in PARAMETERS.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} would not be called: {remedy}. Leave it out.")


__all__ = ["ARGUMENTS", "PARAMETERS", "check_arguments", "check_parameters"]
