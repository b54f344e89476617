"""Detects common mistakes in naming a model from its config.json, before anything is loaded."""

import contextlib
from typing import Any

from transformers.utils import cached_file

from ...drafter.configuration_coral import CoralDraftConfig
from ...utils.jsonl import read_json


# config keys of EAGLE drafters (in the formats of EAGLE, vLLM, SGLang and speculators) that ordinary models lack
_EAGLE_KEYS = (
    "speculators_model_type",
    "eagle_config",
    "eagle_aux_hidden_state_layer_ids",
    "draft_vocab_size",
    "num_aux_hidden_states",
    "coral_config",
)


def check_is_drafter(name: str, revision: str | None = None) -> None:
    """Raises `ValueError` if `--drafter` names an ordinary model or another project's drafter.

    Args:
        name (`str`): a folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit.
    """
    config = _config(name, revision)
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind == CoralDraftConfig.model_type:
        return
    listed = ", ".join(map(str, classes)) if isinstance(classes, list) else ""
    # the first EAGLE checkpoints have the class LlamaForCausalLM and one layer
    if "eagle" in listed.lower() or any(key in config for key in _EAGLE_KEYS) or config.get("num_hidden_layers") == 1:
        raise ValueError(
            f"--drafter {name} is an EAGLE-family checkpoint ({listed or kind}) in the format of EAGLE, vLLM, SGLang or "
            f"speculators, not a CORAL drafter. Convert it with `coral-hf convert --from eagle {name} FOLDER --target "
            "TARGET`, and use that folder."
        )
    if kind is not None:
        raise ValueError(
            f"--drafter {name} is an ordinary model of type {kind!r}, not a CORAL drafter: give the folder of a drafter "
            "that was trained for the target (`coral-hf train`), and name the target with --target. To draft with an "
            "ordinary small model, use `coral-hf benchmark --assistant`."
        )


def check_is_target(name: str, role: str = "target", revision: str | None = None) -> None:
    """Raises `ValueError` if `--target` (or another `role`) names a CORAL drafter.

    Args:
        name (`str`), revision (`str`, *optional*): a folder or Hub id.
        role (`str`): the option.
    """
    config = _config(name, revision)
    if config.get("model_type") != CoralDraftConfig.model_type:
        return
    target = config.get("target_name_or_path")
    trained_for = f", trained for {target}" if target else ""
    raise ValueError(
        f"--{role} {name} is a CORAL drafter{trained_for}: name it with --drafter, and an ordinary model with --{role}."
    )


def _config(name: str, revision: str | None) -> dict[str, Any]:
    """The content of `config.json`; empty if it is missing or damaged, which loading reports later."""
    path = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    with contextlib.suppress(ValueError):
        return {} if path is None else read_json(path)
    return {}


__all__ = ["check_is_drafter", "check_is_target"]
