"""Conversations -> drafter."""

from .arguments import CoralTrainingArguments
from .data import ConversationDataset, read_rows
from .held_out import hold_out
from .regenerate import regenerate
from .trainer import CoralTrainer


__all__ = ["ConversationDataset", "CoralTrainer", "CoralTrainingArguments", "hold_out", "read_rows", "regenerate"]
