"""coral_hf: CORAL speculative decoding for Hugging Face Transformers.

Importing the package registers `CoralDraftConfig` and `CoralDraftModel` with the Auto classes and lets
`model.generate(assistant_model=drafter)` draft with a CORAL drafter. It does nothing else.
"""

from transformers import AutoConfig, AutoModel

from .configuration_coral import CoralDraftConfig
from .generation.hook import coral_generate, install
from .generation.statistics import DraftStats
from .modeling_coral import CoralDraftModel
from .target_adapter import TargetAdapter


__version__ = "0.1.0"

AutoConfig.register("coral", CoralDraftConfig, exist_ok=True)
AutoModel.register(CoralDraftConfig, CoralDraftModel, exist_ok=True)
install()

__all__ = ["CoralDraftConfig", "CoralDraftModel", "DraftStats", "TargetAdapter", "coral_generate"]
