"""Tiny trainings that take seconds: rows, arguments, drafters, trainers, and comparisons."""

import random

import torch
from helpers.tiny_models import make_drafter

from coral_hf import CoralDraftModel
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.trainer import CoralTrainer


# every random draw of a step at once, over two and a half epochs
EVERY_DRAW = {
    "rollout_schedule": "1:0.3,3:0.7",
    "csra_max_positions": 6,
    "loss_vocab_size": 16,
    "loss_negatives": 8,
    "feature_noise": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "max_steps": 10,
    "lr_scheduler_type": "linear",
}


def random_rows(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, 128) for _ in range(rng.randint(low, high))]

    return [{"id": str(index), "prompt_ids": ids(3, 6), "response_ids": ids(5, 12)} for index in range(count)]


def random_features(count: int, size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_args(folder, **kwargs) -> CoralTrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "preset": "coral",
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "loss_chunk_size": 16,
        "learning_curve": False,
    }
    return CoralTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def quick_drafter(target, shape: str = "eagle3", dtype: torch.dtype | None = None, **overrides) -> CoralDraftModel:
    """Starts wider than the default, which suits hidden sizes of hundreds: a few steps must do."""
    return make_drafter(target, shape, dtype, initializer_range=0.2, **overrides)


def make_trainer(folder, target, drafter=None, rows=None, eval_dataset=None, **kwargs) -> CoralTrainer:
    drafter = quick_drafter(target) if drafter is None else drafter
    rows = random_rows(16) if rows is None else rows
    return CoralTrainer(
        model=drafter,
        target_model=target,
        args=make_args(folder, **kwargs),
        train_dataset=rows,
        eval_dataset=eval_dataset,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(first, second, **tolerance):
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """The results of an evaluation, without its times."""
    return {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_per_second"))}
