"""What of a drafter a stage trains, and in which dtype."""

import logging

import torch
from torch import nn


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


__all__ = ["train_in_float32"]
