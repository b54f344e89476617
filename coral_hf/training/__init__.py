"""Rows -> drafter: the trainers, their arguments and the feature cache. Losses, runs and reports are subpackages.

This package does not depend on the command line, and generation never imports it.
"""

from ..data.dataset import ConversationDataset, read_rows
from ..data.held_out import hold_out
from ..responses.regenerate import regenerate
from .arguments import CoralTrainingArguments
from .recipe import choose_recipe, drafter_settings
from .trainer import CoralTrainer


__all__ = [
    "ConversationDataset",
    "CoralTrainer",
    "CoralTrainingArguments",
    "choose_recipe",
    "drafter_settings",
    "hold_out",
    "read_rows",
    "regenerate",
]
