"""Conversations -> drafter."""

from .arguments import CoralTrainingArguments
from .data import ConversationDataset, read_rows
from .regenerate import regenerate
from .trainer import CoralTrainer


__all__ = ["ConversationDataset", "CoralTrainer", "CoralTrainingArguments", "read_rows", "regenerate"]
