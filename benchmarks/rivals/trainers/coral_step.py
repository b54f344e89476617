"""`CoralTrainer`'s step, for `measure_step.py`: the drafter's classification loss over K rollout steps, features given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import coral_hf
from coral_hf import CoralDraftModel
from coral_hf.training import CoralTrainer, CoralTrainingArguments


def load(folder: Path, settings: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """A step on the batch in `folder`, and what the record says of it."""
    data = load_file(folder / "batch.safetensors")
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    drafter = CoralDraftModel.from_target(
        target, shape="eagle3", target_feature_layers=settings["layers"], norm_output=False
    )
    args = CoralTrainingArguments(
        str(folder / "unused"),
        preset="hass",
        rollout_schedule=str(settings["steps"]),
        regression_loss_weight=0.0,
        learning_rate=settings["learning_rate"],
        per_device_train_batch_size=settings["batch"],
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    prompt = settings["prompt"]
    rows = [{"prompt_ids": row[:prompt], "response_ids": row[prompt:]} for row in data["input_ids"].tolist()]
    trainer = CoralTrainer(drafter, target, args, train_dataset=rows)
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    batch["features"] = torch.cat([data["features"], data["last"]], dim=-1)
    optimizer = trainer.create_optimizer()
    model = trainer.accelerator.prepare_model(drafter)  # as train() does

    def step() -> float:
        loss = trainer.training_step(model, dict(batch))
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    trained = sum(weight.numel() for weight in drafter.parameters() if weight.requires_grad)
    return step, {"version": f"coral_hf {coral_hf.__version__}", "trained_parameters": trained, "changed": []}
