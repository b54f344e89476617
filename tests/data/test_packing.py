"""Packed rows: the positions, and that a document's neighbours change neither the target nor the drafter."""

import random

import pytest
import torch
from helpers.tiny_models import make_target, randomize
from helpers.tiny_trainings import assert_same_weights, logged, make_trainer, quick_drafter, random_rows, weights

from coral_hf.data.collator import CoralDataCollator
from coral_hf.data.dataset import ConversationDataset
from coral_hf.data.packing import PackedConversations, pack_lengths
from coral_hf.training.trainer import CoralTrainer


def test_rows_by_hand():
    assert pack_lengths([3, 8, 5, 2, 7], 10) == [[1, 3], [4, 0], [2]]
    assert pack_lengths([4, 4, 4], 8) == [[0, 1], [2]]
    assert pack_lengths([], 8) == []
    with pytest.raises(ValueError, match="a conversation of 9 tokens does not fit into a row of 8"):
        pack_lengths([9], 8)


def test_rows_hold_every_conversation_once_and_waste_little():
    rng = random.Random(0)
    lengths = [rng.randint(1, 64) for _ in range(500)]
    rows = pack_lengths(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert len(rows) <= 1.02 * -(-sum(lengths) // 64)
    assert rows == pack_lengths(lengths, 64)


def test_batch_by_hand():
    dataset = ConversationDataset(
        [{"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt_ids": [1], "response_ids": [9, 9]}]
    )
    packed = PackedConversations(dataset, 8)
    batch = CoralDataCollator(pad_token_id=11)([packed[0], {**dataset[0], "lengths": [4]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 9, 9], [5, 6, 7, 8, 11, 11, 11]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, -100, 9], [-100, -100, 7, 8, -100, -100, -100]]
    assert packed.num_response_tokens == 4 and packed.response_counts(10)[9] == 2


def per_token(trainer: CoralTrainer, items: list, num_steps: int) -> dict[tuple, torch.Tensor]:
    """Every trained row's outputs and target feature, by its conversation (its ids), place and step."""
    batch = trainer.data_collator(items)
    outputs, targets, trained = trainer.rollout(trainer.model, batch, num_steps)
    found = {}
    for index, item in enumerate(items):
        start = 0
        for length in item.get("lengths", [len(item["input_ids"])]):
            key = tuple(item["input_ids"][start : start + length].tolist())
            for row in range(start, start + length - 1):
                for step in range(num_steps):
                    if trained[index, row] and outputs.valid[step][index, row]:
                        hidden = outputs.hidden_states[step][index, row]
                        found[key, row - start, step] = torch.cat([hidden, targets[index, row]])
            start += length
    return found


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention computes its softmax in float32 for any dtype, and sums longer rows in another order."""
    softmax = torch.nn.functional.softmax

    def in_its_own_dtype(input, dim=None, dtype=None, **options):
        return softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", in_its_own_dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "smollm3", "granite"])
def test_every_token_is_predicted_as_in_a_row_of_its_own(family, attention, tmp_path, exact_norms, exact_softmax):
    """Conversations past the sliding windows of 16; slow reference: one conversation a batch."""
    target = make_target(family, attention=attention)
    drafter = randomize(quick_drafter(target, target_feature_layers=[1, -1]))
    rows = [row for row in random_rows(30, seed=3) if len(row["prompt_ids"]) > 3]
    rows[0]["response_ids"] = [7 + index % 90 for index in range(40)]
    trainer = make_trainer(tmp_path, target, drafter, rows, packing=True, max_length=64)
    conversations = trainer.train_dataset.dataset
    expected = {}
    for index in range(len(conversations)):
        expected |= per_token(trainer, [conversations[index]], 3)
    items = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    assert max(len(item["lengths"]) for item in items) > 2
    found = per_token(trainer, items, 3)
    assert found.keys() == expected.keys() and len(found) > 300
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("settings", [{}, {"regression_loss_weight": 0.0}, {"csra_weight": 0.1}])
def test_a_packed_training_equals_the_padded_one(settings, cached, tmp_path, exact_norms):
    """One optimizer step over all conversations, accumulated over other batches: same losses, same weights."""
    rows = random_rows(24, seed=5)
    runs = []
    for packing in (False, True):
        target = make_target()
        drafter = randomize(quick_drafter(target))
        dataset = ConversationDataset(rows)
        count = len(PackedConversations(dataset, 48)) if packing else len(rows)
        arguments = {
            "preset": "hass",
            "rollout_schedule": "3",
            "max_steps": 2,
            "max_length": 48,
            "optim": "sgd",
            **settings,
        }
        if "csra_weight" in settings:
            # its negatives are the rows of one batch: compared where that is the same in both
            arguments |= {"per_device_train_batch_size": count, "csra_max_positions": 10**6}
        else:
            per_batch = 4 if count % 4 == 0 else 1
            arguments |= {
                "per_device_train_batch_size": per_batch,
                "gradient_accumulation_steps": count // per_batch,
            }
        if cached:
            target = target.to(torch.bfloat16).to(torch.float64)
            arguments["cache_features"] = str(tmp_path / "cache")
        trainer = make_trainer(tmp_path / str(packing), target, drafter, dataset, packing=packing, **arguments)
        trainer.train()
        runs.append(trainer)
    padded, packed = runs
    assert len(packed.train_dataset) < len(padded.train_dataset)
    for name in ("loss", "classification_3", "regression_3", "acceptance_2", "response_tokens"):
        assert logged(packed, name) == pytest.approx(logged(padded, name), rel=1e-6), name  # logged in float32
    assert_same_weights(weights(packed.model), weights(padded.model), rtol=0, atol=1e-7)


def test_a_packed_training_resumes_exactly(tmp_path):
    rows = random_rows(40, seed=2)
    arguments = {
        "packing": True,
        "max_length": 32,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": None,
    }
    arguments |= {"per_device_train_batch_size": 2, "num_train_epochs": 3}

    def trainer(folder):
        return make_trainer(folder, make_target(), quick_drafter(make_target()), rows, **arguments)

    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut")
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert_same_weights(weights(cut.model), weights(whole.model), rtol=0, atol=0)
    with pytest.raises(ValueError, match="another data"):
        make_trainer(tmp_path / "other", make_target(), rows=rows, per_device_train_batch_size=2).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12")
        )


def test_targets_that_would_mix_conversations_are_refused(tmp_path):
    target = make_target()
    target.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention', which does not keep"):
        make_trainer(tmp_path, target, packing=True)
    target.config.layer_types = ["conv", "full_attention"]
    with pytest.raises(ValueError, match="packing=True: the target's layers of type conv"):
        make_trainer(tmp_path, target, packing=True)
