"""Adapts a drafter to a fine-tuned target with PEFT: adds adapters and merges them."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from ...drafter.hub_names import hub_commit
from ...drafter.modeling_coral import CoralDraftModel
from ...drafter.target_adapter import TargetAdapter
from ...drafter.weight_files import follow_umask
from ...hub.model_card import CARD_FILE


ADAPTER_FOLDER = "adapter"


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is a PEFT wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def add_adapters(drafter: CoralDraftModel, peft_config: Any, adapter: TargetAdapter) -> Any:
    """Wraps a drafter in adapters and records the target that it is adapted to.

    Args:
        drafter ([`CoralDraftModel`]): a drafter trained for another checkpoint of this target.
        peft_config (`PeftConfig`): without `target_modules`, all linear layers but those of router and low-rank head are adapted.
        adapter ([`TargetAdapter`]): the target to adapt to.

    Returns:
        `PeftModel`

    Raises:
        ValueError: if the drafter has adapters already.
        ImportError: without peft.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs peft: pip install 'coral-hf[train]'.") from error
    if is_peft(drafter):
        raise ValueError(
            "The drafter has adapters already: pass it without peft_config, or remove its adapters first."
        )
    if getattr(peft_config, "target_modules", "") is None:
        peft_config = copy.deepcopy(peft_config)
        peft_config.target_modules = adaptable_modules(drafter)
    drafter.config.target_name_or_path = adapter.text_config._name_or_path or adapter.target.config._name_or_path
    drafter.config.target_revision = hub_commit(adapter.target.config)
    return get_peft_model(drafter, peft_config)


def adaptable_modules(drafter: CoralDraftModel) -> list[str]:
    """Names of a drafter's linear layers, except those of router and low-rank head, which have their own trainings."""
    linear = [name for name, module in drafter.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not name.startswith(("router", "low_rank", "draft_head"))]


def rebuild(model: Any, state_dict: dict[str, Any]) -> Any:
    """A new, unsharded copy of an adapted drafter from its gathered weights, because a sharded one cannot be merged."""
    from peft import get_peft_model

    copied = get_peft_model(CoralDraftModel(model.get_base_model().config), model.active_peft_config)
    copied.load_state_dict(state_dict)
    return copied


def save_merged(model: Any, folder: str | Path) -> CoralDraftModel:
    """Saves an adapted drafter as a merged drafter to `folder`, and its adapters to `folder/adapter`.

    Adapters in `folder` itself (of a checkpoint, or saved by `Trainer`) are removed, because `from_pretrained` would apply
    them to the merged weights again. The model itself keeps its adapters, so that training can continue.

    Returns:
        [`CoralDraftModel`]: the merged drafter.
    """
    model.save_pretrained(Path(folder) / ADAPTER_FOLDER)
    follow_umask(Path(folder) / ADAPTER_FOLDER)
    # PEFT's card: an empty form, except for the path of the original drafter
    (Path(folder) / ADAPTER_FOLDER / CARD_FILE).unlink(missing_ok=True)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder)
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME):
        (Path(folder) / name).unlink(missing_ok=True)
    return merged


__all__ = ["ADAPTER_FOLDER", "adaptable_modules", "add_adapters", "is_peft", "rebuild", "save_merged"]
