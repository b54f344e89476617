"""Resolves a trainer's arguments: loads models given by name, and rejects objects of the wrong kind."""

import os
from dataclasses import fields
from typing import Any

from transformers import AutoTokenizer, TrainingArguments

from ..drafter.configuration_coral import CoralDraftConfig
from ..drafter.modeling_coral import CoralDraftModel
from ..drafter.target_adapter import resolve_target
from .arguments import CoralTrainingArguments


def resolve_models(model: Any, target_model: Any, processing_class: Any) -> tuple[CoralDraftModel, Any, Any]:
    """Returns drafter, target and tokenizer, and loads those given by path or Hub id.

    If the target is given by name, its tokenizer is loaded too.

    Raises:
        ValueError: if one is missing or of the wrong kind, or drafter and target are swapped.
    """
    if is_drafter(target_model) and not is_drafter(model):
        raise ValueError(
            f"model and target_model are swapped: target_model is a CORAL drafter, and model is a {type(model).__name__}. Pass "
            "model=drafter, target_model=target."
        )
    drafter, target = resolve_drafter(model), resolve_target(target_model, "target_model")
    if is_name(target_model) and processing_class is None:
        processing_class = target_model
    if is_name(processing_class):
        processing_class = AutoTokenizer.from_pretrained(processing_class)
    return drafter, target, processing_class


def resolve_drafter(model: Any) -> CoralDraftModel:
    """Returns a drafter, loaded if given by path or Hub id; `ValueError` for any other model."""
    if is_name(model):
        return CoralDraftModel.from_pretrained(model)
    if is_drafter(model):
        return model
    kind = type(model).__name__
    raise ValueError(
        f"model is a {kind}, not a CORAL drafter: pass a new one, CoralDraftModel.from_target(target), one to train further, "
        "CoralDraftModel.from_pretrained(folder), or its path or Hub id."
    )


def resolve_arguments(args: Any, stage: str) -> CoralTrainingArguments:
    """Returns training arguments. From plain `TrainingArguments`, non-default values are used.

    Raises:
        ValueError: for arguments of another trainer.
    """
    if args is None:
        return CoralTrainingArguments(output_dir="outputs/coral", stage=stage)
    if isinstance(args, CoralTrainingArguments):
        return args
    if type(args) is not TrainingArguments:
        raise ValueError(
            f"args is of type {type(args).__name__}: pass CoralTrainingArguments(output_dir=...), which has the fields of "
            "TrainingArguments and the settings of drafter training."
        )
    defaults = TrainingArguments(output_dir=args.output_dir)
    given = {entry.name: getattr(args, entry.name) for entry in fields(TrainingArguments) if entry.init}
    changed = {name: value for name, value in given.items() if value != getattr(defaults, name)}
    return CoralTrainingArguments(output_dir=args.output_dir, stage=stage, **changed)


def is_name(given: Any) -> bool:
    """Whether a value is a path or Hub id."""
    return isinstance(given, str | os.PathLike)


def is_drafter(model: Any) -> bool:
    """Whether a loaded model is a CORAL drafter, with this package's code or a folder's."""
    return getattr(getattr(model, "config", None), "model_type", None) == CoralDraftConfig.model_type


__all__ = ["is_name", "resolve_arguments", "resolve_drafter", "resolve_models"]
