"""Prompt -> tokens: draft trees, acceptance, key-value stores, the decode loop, its costs, and the hook into `generate`.

Knows nothing of training data, records or the Hub; trees and acceptance know tensors, not models.
"""

from .attachment import attach, detach
from .hook import coral_generate
from .statistics import DraftStats


__all__ = ["DraftStats", "attach", "coral_generate", "detach"]
