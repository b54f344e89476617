"""Sets which parts of a drafter a stage trains, and in which dtype."""

import logging
from typing import Any

import torch
from torch import nn

from .adapters import is_peft


logger = logging.getLogger(__name__)

# parts of a draft head with their own training stage: name and trainer
_HEADS = {"router": ("router", "CoralRouterTrainer"), "low_rank": ("low-rank head", "CoralLowRankTrainer")}


def train_in_float32(drafter: nn.Module, say: bool = True) -> None:
    """Casts a drafter from float16 or bfloat16 to float32 in place, because half precision loses most small AdamW steps.

    Frozen parts are cast too, because a drafter computes in one dtype.

    Args:
        drafter (`nn.Module`): unchanged if it is in float32 or float64.
        say (`bool`): log that it was cast.
    """
    half = {parameter.dtype for parameter in drafter.parameters()} & {torch.float16, torch.bfloat16}
    if not half:
        return
    drafter.float()
    if say:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        logger.warning("The drafter's %s weights were cast to float32. It is trained and saved in float32.", names)


def train_stage(drafter: Any, stage: str, say: bool = True) -> None:
    """Freezes everything that a stage does not train: the drafter except for a part of its head, or the head's parts.

    A drafter that the training of a part froze completely is trained again. Other frozen weights stay frozen.

    Args:
        drafter ([`CoralDraftModel`]): with or without adapters.
        stage (`str`): `"drafter"`, `"router"` or `"low_rank"`.
        say (`bool`): log that a part of the head will no longer fit its drafter.
    """
    parts = {name: getattr(drafter, name) for name in _HEADS}
    heads = {name: list(part.parameters()) for name, part in parts.items() if part is not None}
    if stage in parts:
        drafter.requires_grad_(False)
    else:
        ids = {id(parameter) for parameters in heads.values() for parameter in parameters}
        rest = [parameter for parameter in drafter.parameters() if id(parameter) not in ids]
        if not is_peft(drafter) and not any(parameter.requires_grad for parameter in rest):
            drafter.requires_grad_(True)
        for name in heads if say else ():
            part, trainer = _HEADS[name]
            logger.warning(
                "The drafter's %s was trained on outputs that this training changes: train it again afterwards (%s, --stage %s).",
                *(part, trainer, name),
            )
    for name, parameters in heads.items():
        for parameter in parameters:
            parameter.requires_grad_(stage == name)


__all__ = ["train_in_float32", "train_stage"]
