"""What of a drafter a stage trains, and in which dtype."""

import logging
from typing import Any

import torch
from torch import nn

from .adapters import is_peft


logger = logging.getLogger(__name__)


def train_in_float32(drafter: nn.Module, say: bool = True) -> None:
    """Casts a drafter in float16 or bfloat16 to float32, in place: half a dtype's digits lose most of AdamW's small steps.

    What is frozen is cast too, because a drafter computes in one dtype.

    Args:
        drafter (`nn.Module`): in float32 or float64 it stays as it is.
        say (`bool`): log that it was cast.
    """
    half = {parameter.dtype for parameter in drafter.parameters()} & {torch.float16, torch.bfloat16}
    if not half:
        return
    drafter.float()
    if say:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        logger.warning("The drafter's %s weights were cast to float32: it is trained and saved in that.", names)


def train_stage(drafter: Any, stage: str, say: bool = True) -> None:
    """Freezes what a stage leaves as it is: the drafter beside its router, or the router that no loss of the drafter's
    reaches.

    A drafter that the router's training froze whole is trained again; what was frozen in part stays so.

    Args:
        drafter ([`CoralDraftModel`]): perhaps with adapters.
        stage (`str`): `"drafter"` or `"router"`.
        say (`bool`): log that a router will no longer fit its drafter.
    """
    router = list(drafter.router.parameters()) if drafter.router is not None else []
    if stage == "router":
        drafter.requires_grad_(False)
    else:
        ids = {id(parameter) for parameter in router}
        rest = [parameter for parameter in drafter.parameters() if id(parameter) not in ids]
        if not is_peft(drafter) and not any(parameter.requires_grad for parameter in rest):
            drafter.requires_grad_(True)
        if router and say:
            logger.warning(
                "The drafter's router was trained on outputs that this training changes: train it again afterwards "
                "(CoralRouterTrainer, --stage router)."
            )
    for parameter in router:
        parameter.requires_grad_(stage == "router")


__all__ = ["train_in_float32", "train_stage"]
