"""CoralTrainingArguments: `TrainingArguments` plus the settings of drafter training."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.chat import check_template_kwargs
from ..utils.hardware import native_bfloat16
from .losses.terms import TERMS
from .recipe import Recipe, choose_recipe
from .run.unused_settings import check_arguments


PRESETS: dict[str, dict[str, Any]] = {
    # the methods of the papers, with all other settings equal
    "eagle": {"rollout_schedule": "1", "csra_weight": 0.0, "feature_noise": 0.0},
    "hass": {"rollout_schedule": "1:0.6,3:0.4", "csra_weight": 0.0, "feature_noise": 0.0},
    "coral": {"rollout_schedule": "1:0.6,3:0.4", "csra_weight": 0.05, "feature_noise": 0.0},
    # the best known settings: `recipe.choose_recipe` decides
    "recipe": {},
}
# a setting that was not given: `choose_recipe` decides, see `CoralTrainingArguments.settle`
CHOSEN: Any = None
_BY_TARGET = "(default: by target, data and device, see docs/training.md)"
# Published weights of EAGLE and HASS. On SmolLM2-135M, they train much more slowly than the defaults.
PAPER_REGRESSION_WEIGHT, PAPER_CLASSIFICATION_WEIGHT = 1.0, 0.1


@dataclass
class CoralTrainingArguments(TrainingArguments):
    r"""Arguments of [`CoralTrainer`]: the fields of [`~transformers.TrainingArguments`], and the ones below.

    Fields without an effect here (`label_smoothing_factor`, `neftune_noise_alpha`, those for collected predictions, ...) are
    rejected with a remedy. `unused_settings.ARGUMENTS` lists them.

    If learning rate, batch size, warm-up, epochs, weight decay, feature noise, rollout schedule, CSRA's weight or chunk size
    are not given, they depend on the target, the data and the device. [`CoralTrainer`] then chooses them with
    `training.recipe.choose_recipe` and prints them. Until then, they have the values for a small target.

    Other defaults that differ from `TrainingArguments`: AdamW beta2, clipping, bf16, sampling by length, kept columns and
    logging.
    """

    output_dir: str | None = field(
        default=None,
        metadata={"aliases": ["--output"], "help": "Folder for the drafter, its records and its checkpoints."},
    )
    preset: str = field(
        default="recipe",
        metadata={
            "help": "recipe (the best known settings), or a paper's method: eagle (K=1), hass (K=3, no CSRA) or coral (K=3 with CSRA), "
            "each without feature noise. Sets rollout_schedule, csra_weight and feature_noise unless given."
        },
    )
    stage: str = field(
        default="drafter",
        metadata={
            "help": "drafter, or router: train only the LM-head router of a trained drafter, on the target's probability mass per "
            "group (CORAL section 3.2); or low_rank: only its low-rank head, on the distribution of the target's full head (EAGLE-4)."
        },
    )
    rollout_schedule: str = field(
        default=CHOSEN,
        metadata={
            "help": "Rollout steps K over training, as 'K' or 'K:fraction,K:fraction', for example '1:0.6,3:0.4' "
            f"{_BY_TARGET}."
        },
    )
    regression_loss_weight: float = field(
        default=0.2,
        metadata={"help": "Weight of the smooth L1 loss to the next feature (0.2 was better than the paper's 1.0)."},
    )
    classification_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy to the target (the paper's is 0.1)."}
    )
    topk_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of HASS's top-K distillation term (HASS: 1.0; off by default)."}
    )
    topk: int = field(default=10, metadata={"help": "Tokens in HASS's top-K distillation term (HASS: 10)."})
    reverse_kl_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the reverse KL divergence KL(q, p) (off by default)."}
    )
    tv_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the total variation 1 - alpha, alpha = sum min(p, q) (off by default)."},
    )
    nla_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the negative log acceptance -log alpha (off by default)."}
    )
    lk_hybrid_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the LK hybrid, lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha) (off by default; "
            "set classification_loss_weight=0 to use it instead of the cross-entropy)."
        },
    )
    paper_weights: bool = field(
        default=False, metadata={"help": "Use EAGLE's and HASS's loss weights: regression 1.0, classification 0.1."}
    )
    feature_noise: float = field(
        default=CHOSEN,
        metadata={
            "help": "Uniform noise on the features in training, up to this share of their RMS (EAGLE's data "
            f"augmentation). It reduces overfitting when few conversations are repeated {_BY_TARGET}."
        },
    )
    step_decay: float = field(
        default=1.0, metadata={"help": "Step k's loss is weighted step_decay ** (k - 1) (EAGLE-3: 0.8)."}
    )
    csra_weight: float = field(default=CHOSEN, metadata={"help": "Weight of CSRA (0.05 except for eagle and hass)."})
    csra_temperature: float = field(
        default=0.07, metadata={"help": "Temperature of CSRA (not published; 0.07 is common)."}
    )
    csra_include_target: bool = field(
        default=True,
        metadata={"help": "Add the target's feature as another, detached view in CSRA (not in the paper)."},
    )
    csra_max_positions: int = field(
        default=256,
        metadata={"help": "Positions m sampled for CSRA, whose matrix has (K m)^2 entries (not in the paper)."},
    )
    loss_vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Compute a sampled classification loss over this many of the most frequent response tokens, the batch's own "
            "tokens and loss_negatives others. None: the exact loss over the whole vocabulary."
        },
    )
    loss_negatives: int = field(
        default=4096,
        metadata={"help": "With loss_vocab_size: tokens drawn per batch to represent the rest of the vocabulary."},
    )
    loss_chunk_size: int = field(
        default=CHOSEN,
        metadata={
            "help": "Rows whose fp32 logits are in memory at the same time (default: 256 on a CPU; on an accelerator 2048, or "
            "fewer if that would exceed 1 GiB)."
        },
    )
    max_length: int = field(
        default=2048, metadata={"help": "Longer conversations are cut to this length and counted."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables of the target's chat template, as JSON on the command line ('{\"enable_thinking\": false}'). A "
            "column of that name in a row takes precedence."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Pack several whole conversations into rows of up to max_length (a batch then counts rows). Attention "
            "never crosses conversations."
        },
    )
    stream_buffer_size: int = field(
        default=1024, metadata={"help": "Streamed conversations that are shuffled and packed together."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "aliases": ["--overwrite"],
            "help": "Replace the run or the drafter in output_dir. Without this, such a folder is an error.",
        },
    )
    cache_features: str | None = field(
        default=None,
        metadata={"help": "Folder of a feature cache. It is filled once and then read instead of running the target."},
    )
    shard_target: bool = field(
        default=False,
        metadata={
            "help": "Split the frozen target's decoder layers over the processes instead of keeping a copy on each. "
            "Embedding and head stay whole."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: 'last' (the last one in the folder; if there is none, training starts from the "
            "beginning), or the folder of a checkpoint."
        },
    )
    learning_curve: bool = field(
        default=True,
        metadata={
            "help": "Plot losses and acceptance to learning_curve.png in output_dir, if matplotlib is installed."
        },
    )
    eval_chain_depth: int = field(default=5, metadata={"help": "Depth of the chain simulated at evaluation."})

    learning_rate: float = field(default=CHOSEN, metadata={"help": f"Initial learning rate {_BY_TARGET}."})
    per_device_train_batch_size: int = field(
        default=CHOSEN, metadata={"help": f"Conversations per device and forward pass {_BY_TARGET}."}
    )
    gradient_accumulation_steps: int = field(
        default=CHOSEN,
        metadata={
            "help": "Batches accumulated per step (default: by target, data and device; 1 if "
            "per_device_train_batch_size is given)."
        },
    )
    num_train_epochs: float = field(default=CHOSEN, metadata={"help": f"Passes over the data {_BY_TARGET}."})
    warmup_steps: float = field(
        default=CHOSEN, metadata={"help": f"Warm-up steps; below 1, their share of all steps {_BY_TARGET}."}
    )
    weight_decay: float = field(default=CHOSEN, metadata={"help": f"AdamW's weight decay {_BY_TARGET}."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2 (HASS)."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient clipping (HASS)."})
    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 autocast (default: if the hardware multiplies bf16 natively)."}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the mask columns."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Batch conversations of similar length."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every this many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})

    def __post_init__(self):
        # before any value is derived from another value or from the machine
        defaults = {
            entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
            for entry in fields(self)
            if entry.init
        }
        self._given = {name for name, default in defaults.items() if getattr(self, name) != default}
        if self.output_dir is None:
            raise ValueError("No output folder: give one with --output (output_dir=...).")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; choose one of {list(PRESETS)}.")
        if self.stage not in ("drafter", "router", "low_rank"):
            raise ValueError(f"stage={self.stage!r} is unknown; choose drafter, router or low_rank.")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value if self.stage == "drafter" or name != "csra_weight" else 0.0)
        if self.per_device_train_batch_size is not None and self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = 1
        if self.rollout_schedule == "1" and self.csra_weight is None:
            self.csra_weight = 0.0  # CSRA compares several steps
        # a number, until `settle` replaces it by the target's value
        provisional = choose_recipe(stage=self.stage).to_dict()
        self._open = {name: value for name, value in provisional.items() if getattr(self, name) is None}
        for name, value in self._open.items():
            setattr(self, name, value)
        if self.paper_weights:
            self.regression_loss_weight = PAPER_REGRESSION_WEIGHT
            self.classification_loss_weight = PAPER_CLASSIFICATION_WEIGHT
        self.rollout = parse_schedule(self.rollout_schedule)
        deepest = max(steps for steps, _ in self.rollout)
        for term in TERMS:
            weight = getattr(self, term.weight)
            if term.across_steps and weight and deepest == 1 and self.stage == "drafter":
                raise ValueError(
                    f"{term.weight}={weight} with rollout_schedule={self.rollout_schedule!r}: {term.name.upper()} compares "
                    f"steps, but there is only K=1. Use K >= 2 in the schedule, or {term.weight}=0 (preset 'eagle')."
                )
        for name in (
            "loss_chunk_size",
            "max_length",
            "eval_chain_depth",
            "csra_max_positions",
            "topk",
            "stream_buffer_size",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (*(term.weight for term in TERMS), "feature_noise", "loss_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.shard_target and self.cache_features is not None:
            raise ValueError(
                f"shard_target=True with cache_features={self.cache_features!r}: with cached features, the target runs only "
                "once. Fill the cache in a run without shard_target, or train without the cache."
            )
        for name in ("csra_temperature", "step_decay"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        self.chat_template_kwargs = check_template_kwargs(self.chat_template_kwargs, "chat_template_kwargs") or None
        if self.bf16 is None:
            self.bf16 = not self.fp16 and native_bfloat16("cpu" if self.use_cpu else None)
        if not torch.accelerator.is_available():
            self.use_cpu: bool = True  # otherwise bf16=True would be rejected without a GPU
        super().__post_init__()
        check_arguments(self)
        self._settled = self.to_dict()

    def non_defaults(self) -> dict[str, Any]:
        """The arguments whose values differ from their defaults, and those that were changed later."""
        now = self.to_dict()
        return {name: value for name, value in now.items() if name in self._given or value != self._settled.get(name)}

    def settle(self, recipe: Recipe) -> dict[str, Any]:
        """Takes settings that were not given from a recipe.

        Args:
            recipe ([`Recipe`]): see `training.recipe.choose_recipe`.

        Returns:
            `dict`: the settings that the recipe decided.
        """
        values = recipe.to_dict()
        chosen = {name: values[name] for name, value in self._open.items() if getattr(self, name) == value}
        self._open = chosen  # for another trainer with the same arguments
        for name, value in chosen.items():
            setattr(self, name, value)
            self._settled[name] = value
        if "rollout_schedule" in chosen:
            self.rollout = parse_schedule(recipe.rollout_schedule)
        return chosen

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The warm-up steps, rounded down, so that a training of a few steps learns from its first step."""
        return int(self.warmup_steps * (1 if self.warmup_steps >= 1 else num_training_steps))

    def rollout_steps_at(self, progress: float) -> int:
        """The rollout steps K at `progress` in [0, 1] of the training."""
        passed = 0.0
        for steps, fraction in self.rollout:
            passed += fraction
            if progress < passed - 1e-9:
                return steps
        return self.rollout[-1][0]


def parse_schedule(schedule: str) -> list[tuple[int, float]]:
    """`'1:0.6,3:0.4'` -> `[(1, 0.6), (3, 0.4)]`; `'3'` -> `[(3, 1.0)]`.

    Raises:
        ValueError: if it does not parse, a K is below 1, or the fractions do not sum to 1.
    """
    try:
        parts = [part.split(":") for part in str(schedule).split(",")]
        parsed = [(int(part[0]), float(part[1]) if len(part) == 2 else 1.0) for part in parts if len(part) <= 2]
        sound = len(parsed) == len(parts)
    except ValueError:
        parsed, sound = [], False
    if not sound or any(steps < 1 or not 0 < share <= 1 for steps, share in parsed):
        raise ValueError(f"rollout_schedule={schedule!r}: write 'K' or 'K:fraction,K:fraction' with K >= 1.")
    if abs(sum(share for _, share in parsed) - 1.0) > 1e-6:
        raise ValueError(f"rollout_schedule={schedule!r}: the fractions must sum to 1.")
    return parsed


__all__ = ["CoralTrainingArguments"]
