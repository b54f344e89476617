"""Checks a checkpoint against `schemas.json`: names, shapes and dtypes of tensors, and config keys."""

import json
from functools import cache
from importlib import resources
from typing import Any

import torch

from ..drafter.configuration_coral import CoralDraftConfig


FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The name of the decoder layer after import
LAYER = "layers.0"

_JSON_TYPES = {
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}


@cache
def load_schemas() -> dict[str, Any]:
    """The package's `schemas.json`."""
    return json.loads(resources.files(__package__).joinpath("schemas.json").read_text(encoding="utf-8"))


def dimensions(config: CoralDraftConfig) -> dict[str, int]:
    """The schema's letters as numbers for one drafter."""
    hidden = config.hidden_size
    return {
        "H": hidden,
        "2H": 2 * hidden,
        "nH": config.num_target_features * hidden,
        "I": config.intermediate_size,
        "Q": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "V": config.vocab_size,
        "W": config.draft_vocab_size or config.vocab_size,
    }


def layout_shapes(config: CoralDraftConfig, layer: str = LAYER) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Shapes of a drafter's required and optional tensors by name, with `layer` as the decoder layer's prefix."""
    sizes, layout = dimensions(config), load_schemas()["layouts"][config.shape]
    parts = {kind: dict(layout[kind]) for kind in ("required", "optional")}
    for setting, tensors in layout.get("settings", {}).items():
        if getattr(config, setting):
            parts["required"] |= {
                name.replace("{feature}", str(feature)): shape
                for name, shape in tensors.items()
                for feature in range(config.num_target_features)
            }
    required, optional = (
        {name.format(layer=layer): tuple(sizes[letter] for letter in shape) for name, shape in part.items()}
        for part in parts.values()
    )
    return required, optional


def check_tensors(
    tensors: dict[str, torch.Tensor], required: dict[str, tuple], optional: dict[str, tuple], where: str
) -> None:
    """Raises one `ValueError` that lists every missing, unexpected, misshapen or wrongly typed tensor.

    Args:
        tensors (`dict[str, torch.Tensor]`): the tensors found.
        required, optional (`dict[str, tuple]`): shapes by name.
        where (`str`): a description of the tensors, for the message.
    """
    problems = []
    if missing := sorted(set(required) - set(tensors)):
        problems.append(f"missing {missing}")
    if extra := sorted(set(tensors) - set(required) - set(optional)):
        problems.append(f"unexpected {extra}")
    shapes, dtypes = {**optional, **required}, load_schemas()["dtypes"]
    for name in sorted(set(tensors) & set(shapes)):
        tensor, shape = tensors[name], shapes[name]
        if tuple(tensor.shape) != shape:
            problems.append(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
        wanted = getattr(torch, dtypes[name]) if name in dtypes else None
        if tensor.dtype != wanted if wanted else tensor.dtype not in FLOAT_DTYPES:
            expected = dtypes.get(name, "bfloat16, float16 or float32")
            problems.append(f"{name}: expected dtype {expected}, found {str(tensor.dtype).removeprefix('torch.')}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}.")


def check_config(found: dict[str, Any], rules: dict[str, Any], where: str) -> None:
    """Raises one `ValueError` that lists every config key that violates a rule of the schema."""
    problems = []
    for key, rule in rules.items():
        value = found.get(key)
        if rule == "absent":
            if key in found:
                problems.append(f"{key}: expected none, found {value!r}")
        elif isinstance(rule, dict):
            if key not in found or value != rule["const"]:
                problems.append(f"{key}: expected {rule['const']!r}, found {found.get(key, 'nothing')!r}")
        else:
            types = [rule] if isinstance(rule, str) else rule
            if key not in found or not any(_JSON_TYPES[name](value) for name in types):
                problems.append(f"{key}: expected {' or '.join(types)}, found {found.get(key, 'nothing')!r}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}.")


def check_export(engine: str, config: CoralDraftConfig, written: dict[str, Any], tensors: dict) -> None:
    """Raises `ValueError` unless a checkpoint for `engine` matches the repository's schema.

    Args:
        engine (`str`): a key of the schema's engines.
        config ([`CoralDraftConfig`]): the drafter's, which gives the sizes.
        written (`dict`): the engine's `config.json`.
        tensors (`dict[str, torch.Tensor]`): the engine's weights.
    """
    schemas = load_schemas()
    schema = schemas["engines"][engine][config.shape]
    required, optional = layout_shapes(config, schema["layer"])
    for name in schema["required"]:
        required[name.format(layer=schema["layer"])] = optional.pop(name.format(layer=schema["layer"]))
    allowed = {name.format(layer=schema["layer"]) for name in schema["optional"]}
    optional = {name: shape for name, shape in optional.items() if name in allowed}
    where = f"The {engine} checkpoint does not match its schema"
    check_tensors(tensors, required, optional, where)
    settings = schemas["layouts"][config.shape].get("settings", {})
    rules = schema["config"] | {key: {"const": True} if getattr(config, key) else "absent" for key in settings}
    under = schema.get("llama_config_under")
    if under is None:
        check_config(written, {**schemas["llama_config"], **rules}, where)
    else:
        check_config(written, rules, where)
        check_config(written[under], schemas["llama_config"], f"{where}, {under}")


__all__ = ["FLOAT_DTYPES", "LAYER", "check_config", "check_export", "check_tensors", "layout_shapes", "load_schemas"]
