"""Prompt -> tokens: draft trees, acceptance, key-value stores, the decode loop, its costs, and the hook into `generate`.

This package does not depend on training data, records or the Hub. Trees and acceptance depend on tensors, not on models.
"""

from .attachment import attach, detach
from .hook import coral_generate
from .statistics import DraftStats


__all__ = ["DraftStats", "attach", "coral_generate", "detach"]
