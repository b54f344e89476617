"""The recipes to compare. Each changes training arguments, the drafter's settings, or the optimizer."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Changes from the common settings.

    Args:
        arguments (`dict`): of [`CoralTrainingArguments`].
        config (`dict`): of [`CoralDraftConfig`].
        optimizer (`str`): `"adamw"` or `"muon"`.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ({}, "adamw")}


def _rollout(steps: int | str, **arguments: Any) -> Recipe:
    return Recipe({"preset": "hass", "rollout_schedule": str(steps), **arguments})


def _coral(**arguments: Any) -> Recipe:
    return Recipe({"preset": "coral", "rollout_schedule": "3", **arguments})


def _only(name: str, **arguments: Any) -> Recipe:
    """Another divergence instead of the cross-entropy, at K = 3."""
    return _rollout(3, classification_loss_weight=0.0, **{f"{name}_loss_weight": 1.0}, **arguments)


# All except the first two are compared with hass3, from which they differ as their names say.
BASELINE = "hass3"
RECIPES: dict[str, Recipe] = {
    "eagle": Recipe({"preset": "eagle"}),
    "hass3": _rollout(3),
    # depth of the rollout
    "hass2": _rollout(2),
    "hass5": _rollout(5),
    "hass3_late": _rollout("1:0.5,3:0.5"),
    "hass3_decay_0.8": _rollout(3, step_decay=0.8),
    # CSRA
    "csra_0.01": _coral(csra_weight=0.01),
    "csra_0.05": _coral(csra_weight=0.05),
    "csra_0.3": _coral(csra_weight=0.3),
    "csra_1": _coral(csra_weight=1.0),
    "csra_0.3_temperature_0.2": _coral(csra_weight=0.3, csra_temperature=0.2),
    "csra_0.3_temperature_0.5": _coral(csra_weight=0.3, csra_temperature=0.5),
    "csra_0.3_no_target": _coral(csra_weight=0.3, csra_include_target=False),
    # the divergence
    "reverse_kl": _only("reverse_kl"),
    "tv": _only("tv"),
    "nla": _only("nla"),
    "lk_hybrid": _only("lk_hybrid"),
    "top_k": _rollout(3, topk_loss_weight=1.0),
    # the regression
    "no_regression": _rollout(3, regression_loss_weight=0.0),
    "paper_weights": _rollout(3, paper_weights=True),
    # everything else
    "muon": Recipe({"preset": "hass", "rollout_schedule": "3"}, optimizer="muon"),
    "noise_0.1": _rollout(3, feature_noise=0.1),
    "last_layer": Recipe({"preset": "hass", "rollout_schedule": "3"}, {"target_feature_layers": [-1]}),
    "eagle_shape": Recipe(
        {"preset": "hass", "rollout_schedule": "3"}, {"shape": "eagle", "target_feature_layers": [-1]}
    ),
    "half_width": Recipe({"preset": "hass", "rollout_schedule": "3"}, {"intermediate_size": 0.5}),
    "double_width": Recipe({"preset": "hass", "rollout_schedule": "3"}, {"intermediate_size": 2.0}),
}


def chosen(names: list[str]) -> dict[str, Recipe]:
    """The recipes of these names, in this order.

    Raises:
        ValueError: for unknown names.
    """
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ValueError(f"--recipes {unknown}: the lab has {', '.join(RECIPES)}.")
    return {name: RECIPES[name] for name in names}


__all__ = ["BASELINE", "RECIPES", "Recipe", "chosen"]
