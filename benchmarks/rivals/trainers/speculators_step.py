"""The EAGLE-3 step of speculators (PyPI, read at 0.9.0), for `measure_step.py`.

Its `Trainer` moves the model to `local_rank`, which is a GPU. What `Trainer.train_epoch` does with a batch is done here without that:
forward, loss, backward, clipping at 1.0, AdamW. Conversations are packed into one row, as its collator does.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig


CHANGED = [
    "the model stays on the CPU (Trainer.setup_model moves it to a GPU)",
    "no autocast: float32 throughout",
    "losses of loss_implementation='eager' (the default, 'fused', needs Triton)",
    "attention by 'sdpa' with a dense mask (the default, flex attention, is compiled for GPUs)",
]


def _model(folder: Path, settings: dict[str, Any], attention: str) -> Any:
    from speculators.models.eagle3 import Eagle3DraftModel

    path = str(folder / "target")
    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = 1  # of the draft
    return Eagle3DraftModel.from_training_args(
        config,
        verifier_name_or_path=path,
        draft_vocab_size=config.vocab_size,
        norm_before_residual=False,
        ttt_steps=settings["steps"],
        target_layer_ids=settings["layers"],
        draft_attn_impl=attention,
    )


def _batch(folder: Path) -> dict[str, torch.Tensor]:
    """The rows, each shifted as its data set does, packed into one."""
    from speculators.models.eagle3 import shift_batch

    data = load_file(folder / "batch.safetensors")
    rows = []
    for index, ids in enumerate(data["input_ids"]):
        row = shift_batch(
            {
                "input_ids": ids,
                "hidden_states": data["features"][index],
                "verifier_last_hidden_states": data["last_before_norm"][index],
                "loss_mask": data["loss_mask"][index].bool(),
                "lengths": torch.tensor([len(ids)]),
                "position_ids": torch.arange(len(ids)),
            }
        )
        del row["lengths"]
        row["document_ids"] = torch.full_like(row["input_ids"], index)
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}


def _arguments(settings: dict[str, Any], implementation: str) -> dict[str, Any]:
    from speculators.models.eagle3 import Eagle3DraftModel

    train, _ = Eagle3DraftModel.get_trainer_kwargs(
        loss_fn="kl_div",
        loss_implementation=implementation,
        ttt_steps=settings["steps"],
        ttt_step_loss_decay=1.0,
    )
    return train


def published(folder: Path, settings: dict[str, Any]) -> None:
    """An epoch of one step with its `Trainer`, as published."""
    from speculators.train.trainer import Trainer, TrainerConfig

    config = TrainerConfig(
        lr=settings["learning_rate"],
        num_epochs=1,
        save_path=str(folder / "speculators"),
        train_call_kwargs=_arguments(settings, "fused"),
        hidden_states_dtype=torch.float32,
    )
    model = _model(folder, settings, "simple_flex_attention")
    Trainer(model, config, DataLoader([_batch(folder)], batch_size=None)).train_epoch(0)


def load(folder: Path, settings: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """A step on the batch in `folder`, and what the record says of it."""
    from speculators.train.optimizers import build_optimizers
    from speculators.train.trainer import TrainerConfig

    model = _model(folder, settings, "sdpa").float().train()
    config = TrainerConfig(lr=settings["learning_rate"], num_epochs=1, save_path="unused")
    optimizers = build_optimizers(model, config)
    batch, arguments = _batch(folder), _arguments(settings, "eager")

    def step() -> float:
        _, loss, _ = model(**batch, **arguments)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    version = f"speculators {importlib.metadata.version('speculators')}"
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return step, {"version": version, "trained_parameters": trained, "changed": CHANGED}
