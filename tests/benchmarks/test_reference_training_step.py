"""The reference step of the training benchmark computes the trainer's losses and gradients, more slowly."""

import runpy
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import make_trainer

from coral_hf import CoralDraftModel
from coral_hf.data.collator import CoralDataCollator
from coral_hf.data.dataset import ConversationDataset


ReferenceStep = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "reference_training_step.py"))[
    "ReferenceStep"
]


@pytest.mark.parametrize("prompt", [1, 3])  # with a prompt of one token, the first rows have no whole chain
@pytest.mark.parametrize("num_steps", [1, 3])
def test_trainer_and_reference_agree(num_steps, prompt, tmp_path):
    torch.manual_seed(0)
    target = make_target(dtype=torch.float32)
    drafter = CoralDraftModel.from_target(target)
    ids = torch.randint(3, target.config.vocab_size, (2, 12)).tolist()
    rows = [{"prompt_ids": row[:prompt], "response_ids": row[prompt:]} for row in ids]
    trainer = make_trainer(
        tmp_path, target, drafter, rollout_schedule=str(num_steps), csra_weight=0.0, regression_loss_weight=0.3
    )
    dataset = ConversationDataset(rows)
    batch = CoralDataCollator(0)([dataset[index] for index in range(2)])
    response = batch["labels"] != -100
    reference = ReferenceStep(target, drafter, num_steps, False, regression_weight=0.3, classification_weight=1.0)
    expected = reference.loss(batch["input_ids"], response)
    loss = trainer.compute_loss(drafter, batch, num_items_in_batch=response.sum())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    pairs = {
        "fc": (drafter.fc, reference.drafter.fc),
        "q_proj": (drafter.layer.self_attn.q_proj, reference.drafter.q_proj),
        "k_proj": (drafter.layer.self_attn.k_proj, reference.drafter.k_proj),
        "v_proj": (drafter.layer.self_attn.v_proj, reference.drafter.v_proj),
        "down_proj": (drafter.layer.mlp.down_proj, reference.drafter.down_proj),
    }
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-6, msg=name)
    bf16 = ReferenceStep(target, drafter, num_steps, True, regression_weight=0.3, classification_weight=1.0)
    first, second = (bf16.step(batch["input_ids"], response) for _ in range(2))
    assert abs(first - expected.item()) < 0.02 * expected.item() and second < first
