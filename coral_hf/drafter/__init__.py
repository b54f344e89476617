"""The drafter: exactly the files that a published drafter contains, in one folder, with relative imports only.

This package does not depend on generation, training or the Hub. Other packages add their methods to a drafter from outside.
"""

from .configuration_coral import CoralDraftConfig
from .modeling_coral import CoralDraftModel
from .target_adapter import TargetAdapter


__all__ = ["CoralDraftConfig", "CoralDraftModel", "TargetAdapter"]
