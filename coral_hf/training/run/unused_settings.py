"""Settings of Transformers' trainer that have no effect in drafter training. They are rejected with a remedy."""

from typing import Any


_EVALUATION = "an evaluation simulates chains and collects no predictions: use what trainer.evaluate() returns"
# name: (value without an effect, why it is rejected and what to do)
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the losses compare with the target's whole distribution, not with labels"),
    "neftune_noise_alpha": (
        None,
        "a drafter has no own embedding; feature_noise adds noise to the features that it reads",
    ),
    "include_num_input_tokens_seen": ("no", "the log counts response_tokens, the tokens that are trained on"),
    "bf16_full_eval": (False, "an evaluation uses the precision of the training: set bf16=True for both"),
    "fp16_full_eval": (False, "an evaluation uses the precision of the training: set fp16=True for both"),
    "prediction_loss_only": (False, _EVALUATION),
    "eval_accumulation_steps": (None, _EVALUATION),
    "include_for_metrics": ([], _EVALUATION),
    "batch_eval_metrics": (False, _EVALUATION),
    "eval_do_concat_batches": (True, _EVALUATION),
    "eval_use_gather_object": (False, _EVALUATION),
    "label_names": (None, "response masks decide which tokens are trained on"),
    "length_column_name": ("length", "lengths are taken from the token ids"),
}
PARAMETERS = {
    "model_init": "pass the drafter as model, and set the seed before creating it (transformers.set_seed)",
    "compute_loss_func": "CoralTrainingArguments sets the losses and their weights; for other losses, override compute_loss",
    "compute_metrics": _EVALUATION,
    "preprocess_logits_for_metrics": _EVALUATION,
}


def check_arguments(args: Any) -> None:
    """Raises `ValueError` if training arguments request something that drafter training does not support."""
    for name, (unused, remedy) in ARGUMENTS.items():
        if (value := getattr(args, name, unused)) != unused:
            raise ValueError(f"{name}={value!r} would have no effect: {remedy}. Leave it out.")
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"{name}={getattr(args, name)!r}: the reentrant form needs inputs with a gradient, but a drafter's inputs have none. "
                "Leave use_reentrant out."
            )


def check_parameters(given: dict[str, Any]) -> None:
    """Raises `ValueError` if a trainer gets a function that it would not call."""
    for name, remedy in PARAMETERS.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} would not be called: {remedy}. Leave it out.")


__all__ = ["ARGUMENTS", "PARAMETERS", "check_arguments", "check_parameters"]
