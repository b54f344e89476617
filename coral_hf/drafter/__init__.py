"""The drafter: exactly the files that a published drafter carries, flat, with relative imports only.

Knows nothing of generation, training or the Hub; what the package adds to a drafter is attached from above.
"""

from .configuration_coral import CoralDraftConfig
from .modeling_coral import CoralDraftModel
from .target_adapter import TargetAdapter


__all__ = ["CoralDraftConfig", "CoralDraftModel", "TargetAdapter"]
