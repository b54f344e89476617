"""Default settings of a training, chosen by the target's width, the size of the data and the device.

`docs/build_recipe.py` writes the tables of docs/training.md from those below. Everything that states a setting
(`CoralTrainer`, `coral-hf train`, `--estimate`, the recipes) uses `choose_recipe` and `drafter_settings`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from .losses.chunked_pass import default_chunk_size


# Learning rates: target width, rate at 8 conversations per step, rate at 64, source. Rates between rows and columns are
# interpolated logarithmically. Outside the table, the nearest rate applies.
LEARNING_RATES = (
    (
        576,
        1e-3,
        2e-3,
        "ours: training/ablation.json (batches of 8) and training/log.jsonl (64) of the shipped drafter",
    ),
    (4096, 3e-5, 5e-5, "EAGLE and HASS 3e-5, EAGLE-3 5e-5, on 7B and 8B targets"),
)
FEW, MANY = 8, 64
# Share of the rate for continued training of a drafter (shipped drafter: 5e-4 and 2e-4 to 4e-4 after 1e-3 and 2e-3)
CONTINUED_SHARE = 0.25
# The router's rate at a width of 576 (ours), lowered as 1 / width: no other has been measured. A low-rank head takes it too.
HEAD_RATE = 1e-3

# Conversations per step, for data of fewer response tokens than this (measured: 8 at 0.2 million tokens, 64 at 22 million)
BATCHES = ((1_000_000, 8), (5_000_000, 16), (20_000_000, 32), (None, 64))
CPU_BATCH = 16  # most conversations per step on a CPU (measured with 8 to 16)
# Conversations that an accelerator processes at the same time, up to this width (limited by memory, see `--estimate`)
MICRO_BATCHES = ((1024, 16), (2048, 8), (3072, 4), (None, 2))
CPU_MICRO_BATCH = 8
# Epochs for data of fewer response tokens than this, for targets narrower than WIDE and for others. HASS reads 68k
# conversations 40 times; speculators recommends 2 to 3 epochs of 500k. A small drafter overfits few conversations.
EPOCHS = ((5_000_000, 3.0, 10.0), (50_000_000, 2.0, 10.0), (500_000_000, 1.0, 3.0), (None, 1.0, 2.0))
WIDE = 2048

WARMUP = 0.03  # share of all steps (shipped drafter: 30 of 1,684 and 448, 10 to 20 of 250)
WEIGHT_DECAY = 0.05  # the shipped drafter's
FEATURE_NOISE = 0.1  # the shipped drafter's first and last stages
NEW_SCHEDULE = "1:0.5,3:0.5"  # the shipped drafter's first two stages together
CONTINUED_SCHEDULE = "3"  # its later stages
CSRA_WEIGHT = 0.05

# The shortlist contains one of this many ids (shipped drafter: 8,192 of 49,152; FR-Spec: 8k to 32k of 128k)
SHORTLIST_SHARE, SHORTLIST_UNIT = 6, 1024


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, with their names in [`CoralTrainingArguments`].

    Args:
        learning_rate (`float`), per_device_train_batch_size (`int`), gradient_accumulation_steps (`int`)
        warmup_steps (`float`): a share of all steps if below 1.
        num_train_epochs (`float`), weight_decay (`float`), feature_noise (`float`)
        rollout_schedule (`str`), csra_weight (`float`), loss_chunk_size (`int`)
    """

    learning_rate: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    warmup_steps: float
    num_train_epochs: float
    weight_decay: float
    feature_noise: float
    rollout_schedule: str
    csra_weight: float
    loss_chunk_size: int

    @property
    def deepest(self) -> int:
        """The largest K of the schedule."""
        return max(int(part.partition(":")[0]) for part in self.rollout_schedule.split(","))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_recipe(
    hidden_size: int = LEARNING_RATES[0][0],
    vocab_size: int = 49152,
    *,
    response_tokens: int | None = None,
    device_type: str = "cpu",
    num_processes: int = 1,
    rows_per_conversation: float = 1.0,
    stage: str = "drafter",
    continued: bool = False,
) -> Recipe:
    """Chooses the settings of a training that were not given.

    Args:
        hidden_size (`int`), vocab_size (`int`): the target's sizes.
        response_tokens (`int`, *optional*): response tokens in one pass over the data. None (a stream) counts as a large number.
        device_type (`str`): `"cpu"`, `"cuda"`, ...
        num_processes (`int`): processes that share a step's conversations.
        rows_per_conversation (`float`): below 1 if conversations are packed into rows. Batches then count rows.
        stage (`str`): `"drafter"`, `"router"` or `"low_rank"`.
        continued (`bool`): the drafter was trained before.

    Returns:
        [`Recipe`]
    """
    on_cpu = device_type == "cpu"
    total: int = _below(BATCHES, response_tokens)[1]
    micro: int = CPU_MICRO_BATCH if on_cpu else _below(MICRO_BATCHES, hidden_size, inclusive=True)[1]
    if on_cpu:
        total = min(total, CPU_BATCH)
    micro = max(1, min(micro, total // num_processes))
    steps = max(1, round(total / (micro * num_processes)))
    head = stage != "drafter"
    rate = HEAD_RATE * LEARNING_RATES[0][0] / hidden_size if head else _learning_rate(hidden_size, total)
    if continued and not head:
        rate *= CONTINUED_SHARE
    epochs = _below(EPOCHS, response_tokens)
    return Recipe(
        learning_rate=float(f"{rate:.1e}"),
        per_device_train_batch_size=max(1, round(micro * rows_per_conversation)),
        gradient_accumulation_steps=steps,
        warmup_steps=WARMUP,
        num_train_epochs=1.0 if head else epochs[1] if hidden_size < WIDE else epochs[2],
        weight_decay=WEIGHT_DECAY,
        feature_noise=0.0 if head else FEATURE_NOISE,
        rollout_schedule=CONTINUED_SCHEDULE if continued or head else NEW_SCHEDULE,
        csra_weight=0.0 if head else CSRA_WEIGHT,
        loss_chunk_size=default_chunk_size(device_type, vocab_size),
    )


def _learning_rate(hidden_size: int, batch: int) -> float:
    (narrow, *low, _), (wide, *high, _) = LEARNING_RATES
    place = _place(hidden_size, narrow, wide)
    few, many = (math.exp((1 - place) * math.log(a) + place * math.log(b)) for a, b in zip(low, high, strict=True))
    share = _place(batch, FEW, MANY)
    return math.exp((1 - share) * math.log(few) + share * math.log(many))


def _place(value: float, start: float, end: float) -> float:
    """The position of `value` between two others on a logarithmic scale, within [0, 1]."""
    return min(1.0, max(0.0, math.log(value / start) / math.log(end / start)))


def _below(table: tuple, value: int | None, inclusive: bool = False) -> tuple:
    """The first row of a table whose bound is above `value`."""
    for row in table:
        if row[0] is None or (value is not None and (value < row[0] or (inclusive and value == row[0]))):
            return row
    raise AssertionError("a table ends without a bound")


def settle_arguments(args: Any, drafter: Any, adapter: Any, conversations: Any, rows: Any) -> dict[str, Any]:
    """Completes a trainer's arguments. The first process prints the chosen settings.

    Args:
        args ([`CoralTrainingArguments`]): changed in place.
        drafter ([`CoralDraftModel`]), adapter ([`TargetAdapter`])
        conversations ([`ConversationDataset`], *optional*): None for a stream.
        rows: the rows of batches: packed conversations, or the same as `conversations`.

    Returns:
        `dict`: the chosen settings, by their names in `args`.
    """
    tokens = None if conversations is None else conversations.num_response_tokens
    continued = bool(drafter.config._name_or_path)
    recipe = choose_recipe(
        adapter.hidden_size,
        adapter.vocab_size,
        response_tokens=tokens,
        device_type=args.device.type,
        num_processes=args.world_size,
        rows_per_conversation=1.0 if conversations is None else len(rows) / len(conversations),
        stage=args.stage,
        continued=continued,
    )
    chosen = args.settle(recipe)
    if chosen and args.process_index == 0 and rows is not None:
        size = "a stream" if tokens is None else f"{tokens:,} response tokens"
        kind = "a trained drafter" if continued else "a new drafter"
        values = ", ".join(f"{name} {_shown(value)}" for name, value in chosen.items())
        print(f"Settings for {kind}, a target of width {adapter.hidden_size}, {size}, {args.device.type}: {values}")
    return chosen


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def drafter_settings(target_config: Any) -> dict[str, Any]:
    """Settings of [`CoralDraftConfig`] for a new drafter: the shape of the shipped drafter, with four features.

    Args:
        target_config (`PreTrainedConfig`)

    Returns:
        `dict`: shape and feature layers. The features are the inputs of four layers, which serving engines can capture: at
        a tenth and at half of the target's depth, the fourth from the end and the last. For a target of at most two layers,
        only the last hidden state is used.
    """
    depth = getattr(target_config.get_text_config(), "num_hidden_layers", None) or 0
    layers = sorted({max(1, depth // 10), depth // 2, depth - 4, depth - 1})
    layers = [layer for layer in layers if layer >= 1]
    return {"shape": "eagle3", **({"target_feature_layers": layers} if len(layers) > 1 else {})}


def shortlist_size(vocab_size: int) -> int:
    """Size of a new drafter's shortlist, a multiple of a thousand; 0 (none) for a small vocabulary."""
    return vocab_size // SHORTLIST_SHARE // SHORTLIST_UNIT * SHORTLIST_UNIT


__all__ = ["Recipe", "choose_recipe", "drafter_settings", "settle_arguments", "shortlist_size"]
