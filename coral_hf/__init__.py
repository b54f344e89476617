"""coral_hf: CORAL speculative decoding for Hugging Face Transformers.

Importing the package registers `CoralDraftConfig` and `CoralDraftModel` with the Auto classes, lets
`model.generate(assistant_model=drafter)` draft with a CORAL drafter, and adds conversion and publishing to drafters. It has
no other side effects.
"""

from typing import Any

from transformers import AutoConfig, AutoModel

from .utils.requirements import explained


try:
    from .drafter.configuration_coral import CoralDraftConfig
    from .drafter.modeling_coral import CoralDraftModel
    from .drafter.target_adapter import TargetAdapter
    from .generation.attachment import attach, detach
    from .generation.hook import coral_generate, install
    from .generation.statistics import DraftStats
    from .utils.code_version import __version__ as __version__
except ImportError as error:
    raise explained(error) from error


def _from_eagle(*args: Any, **kwargs: Any) -> CoralDraftModel:
    from .conversion import load_eagle

    return load_eagle(*args, **kwargs)


def _write_code(folder: Any) -> None:
    from .hub.publish import write_code

    write_code(folder)


def _push_to_hub(*args: Any, **kwargs: Any) -> str:
    from .hub.publish import push_drafter

    return push_drafter(*args, **kwargs)


AutoConfig.register("coral", CoralDraftConfig, exist_ok=True)
AutoModel.register(CoralDraftConfig, CoralDraftModel, exist_ok=True)
CoralDraftModel.extensions.update(from_eagle=_from_eagle, push_to_hub=_push_to_hub, write_code=_write_code)
install()

__all__ = ["CoralDraftConfig", "CoralDraftModel", "DraftStats", "TargetAdapter", "attach", "coral_generate", "detach"]
