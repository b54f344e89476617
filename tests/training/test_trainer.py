"""Tiny trainings: which weights change, and that every way of running one gives the same drafter."""

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target
from helpers.tiny_trainings import assert_same_weights, logged, make_trainer, quick_drafter, random_rows, weights
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.data.collator import CoralDataCollator
from coral_hf.data.dataset import ConversationDataset
from coral_hf.utils import compat


# Whole trainings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["eagle", "hass", "coral"])
@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
def test_two_epochs(preset, shape, tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = quick_drafter(target, shape)
    rows = random_rows(16)
    trainer = make_trainer(tmp_path, target, drafter, rows, eval_dataset=rows, preset=preset)
    target_before, drafter_before = weights(target), weights(drafter)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert all(torch.equal(tensor, target_before[name]) for name, tensor in weights(target).items())
    assert all(parameter.grad is None for parameter in target.parameters())
    moved = {name for name, tensor in weights(drafter).items() if not torch.equal(tensor, drafter_before[name])}
    assert moved == set(drafter_before), "every parameter takes part"
    deepest = 1 if preset == "eagle" else 3
    assert logged(trainer, "rollout_steps")[0] == 1 and logged(trainer, "rollout_steps")[-1] == deepest
    assert bool(logged(trainer, f"classification_{deepest}")) and not logged(trainer, f"classification_{deepest + 1}")
    assert bool(logged(trainer, "csra")) == (preset == "coral")
    assert logged(trainer, "response_tokens")[-1] == 2 * trainer.train_dataset.num_response_tokens
    for name in ("classification_1", "regression_1", "acceptance_1", "eval_acceptance_1", "eval_acceptance_length"):
        assert logged(trainer, name), name


def test_schedule_switches_in_the_middle(tmp_path):
    target = make_target(dtype=torch.float32)
    trainer = make_trainer(tmp_path, target, rollout_schedule="1:0.5,3:0.5", num_train_epochs=2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [("classification_3" in entry) for entry in steps] == [False] * 4 + [True] * 4
    assert [("csra" in entry) for entry in steps] == [False] * 4 + [True] * 4
    assert [entry["rollout_steps"] for entry in steps] == [1] * 4 + [3] * 4


def test_bf16_and_every_option_at_once(tmp_path):
    target = make_target("gemma3_text", dtype=torch.bfloat16)
    drafter = quick_drafter(target, "eagle3", torch.float32, target_feature_layers=[0, 2])
    trainer = make_trainer(
        tmp_path,
        target,
        drafter,
        eval_dataset=random_rows(4, seed=1),
        bf16=True,
        rollout_schedule="3",
        topk_loss_weight=1.0,
        step_decay=0.8,
        loss_vocab_size=24,
        loss_negatives=8,
        csra_max_positions=8,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
    )
    trainer.train()
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in drafter.parameters())
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert len(logged(trainer, "eval_acceptance_length")) == 2 and logged(trainer, "topk_3")


# One batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[-1], [1, 2], [1, -1]])
def test_rollout_rows_are_aligned(layers, tmp_path):
    """Row r reads e(x_{r+1}) and f_r, regresses f_{r+1} and predicts x_{r+2}; it counts iff x_{r+2} is trained."""
    target = make_target()
    drafter = make_drafter(target, target_feature_layers=layers)
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}, {"prompt_ids": [4, 4, 4, 4], "response_ids": [3, 3, 3]}]
    trainer = make_trainer(tmp_path, target, drafter, rows)
    batch = CoralDataCollator(0)([trainer.train_dataset[0], trainer.train_dataset[1]])
    seen = {}

    def spy(module, args, kwargs):
        seen.update(kwargs)

    hook = drafter.register_forward_pre_hook(spy, with_kwargs=True)
    _, predicted, trained = trainer.rollout(drafter, batch, 2)
    hook.remove()
    with torch.no_grad():
        out = target(batch["input_ids"], attention_mask=(batch["document_ids"] >= 0).long(), output_hidden_states=True)
    adapter = TargetAdapter(target, layers)
    assert torch.equal(seen["inputs_embeds"], adapter.embed(batch["input_ids"])[:, 1:])
    torch.testing.assert_close(seen["features"], adapter.features(out)[:, :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(predicted, out.hidden_states[-1][:, 1:], rtol=0, atol=1e-12)
    # x_3, x_4 of the first conversation; x_4, x_5, x_6 of the second
    assert trained.tolist() == [[False, True, True, False, False, False], [False, False, True, True, True, False]]
    assert seen["document_ids"].tolist() == [[0, 0, 0, 0, -1, -1], [0] * 6]


def test_the_loss_is_the_sum_written_out(tmp_path):
    """Sums over counted rows divided by response tokens, per step; plus CSRA over all counted rows."""
    target = make_target()
    drafter = quick_drafter(target)
    trainer = make_trainer(
        tmp_path,
        target,
        drafter,
        rollout_schedule="3",
        regression_loss_weight=0.3,
        classification_loss_weight=0.7,
        topk_loss_weight=0.0,
        step_decay=0.5,
        csra_weight=0.2,
        csra_temperature=0.5,
    )
    rows = [{"prompt_ids": [5], "response_ids": [8, 9, 8]}, {"prompt_ids": [4, 4, 4, 4], "response_ids": [3, 3, 3]}]
    dataset = ConversationDataset(rows)
    batch = CoralDataCollator(0)([dataset[0], dataset[1]])
    count = int((batch["labels"] != -100).sum())
    assert count == 5
    adapter = trainer.adapter
    outputs, targets, trained = trainer.rollout(drafter, batch, 3)
    expected = 0.0
    views = []
    for step in range(3):
        total = 0.0
        for sample, row in trained.nonzero().tolist():
            if row < step:  # no chain
                continue
            hidden, feature = outputs.hidden_states[step][sample, row], targets[sample, row]
            p = adapter.logits(feature).softmax(-1)
            total += 0.7 * -(p * adapter.logits(hidden).log_softmax(-1)).sum() + 0.3 * F.smooth_l1_loss(
                hidden, feature
            )
            views.append((step, (sample, row), F.normalize(hidden, dim=0)))
        expected += 0.5**step * total / count
    views += [(3, tuple(place), F.normalize(targets[tuple(place)], dim=0)) for place in trained.nonzero().tolist()]
    anchors = []
    for step, place, view in views:
        others = [(s, p, torch.exp(view @ v / 0.5)) for s, p, v in views if (s, p) != (step, place)]
        total = sum(value for _, _, value in others)
        anchors.append(torch.stack([-torch.log(value / total) for _, p, value in others if p == place]).mean())
    expected += 0.2 * torch.stack(anchors).mean()
    for items in (None, torch.tensor(count)):
        loss = trainer.compute_loss(drafter, batch, num_items_in_batch=items)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)  # shares of tokens are float32
    # as one part of an accumulated batch of 20 tokens
    part = trainer.compute_loss(drafter, batch, num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(part, expected * count / 20, rtol=1e-7, atol=1e-7)


def test_the_logged_loss_is_what_is_optimised(tmp_path):
    """Also for the top-K term, whose gradient is computed with that of the classification loss."""
    results = []
    for weight in (0.0, 50.0):
        target = make_target()
        trainer = make_trainer(tmp_path, target, preset="hass", rollout_schedule="3", topk_loss_weight=weight)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        loss = trainer.compute_loss(trainer.model.train(), batch)
        results.append(loss.item())
    sums = trainer._metrics._sums  # mean times rows, and rows
    terms = sum(sums[f"topk_{step}"][0] for step in (1, 2, 3)) / sums["topk_1"][1]
    assert terms > 1 and results[1] == pytest.approx(results[0] + 50 * terms.item(), rel=1e-6)


def test_acceptance_among_sampled_tokens_has_another_name(tmp_path):
    trainer = make_trainer(tmp_path, make_target(), loss_vocab_size=8, loss_negatives=4, max_steps=2)
    trainer.train()
    assert logged(trainer, "acceptance_1_sampled")
    assert not logged(trainer, "acceptance_1") and not logged(trainer, "acceptance_length")


@pytest.mark.parametrize("rollout_schedule", ["1", "3"])
def test_accumulation_does_not_change_the_training(rollout_schedule, tmp_path):
    target = make_target()
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            target,
            rows=random_rows(8),
            preset="hass",
            rollout_schedule=rollout_schedule,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.0,
            num_train_epochs=1,
        )
        before = weights(trainer.model)
        trainer.train()
        results.append(weights(trainer.model))
    assert_same_weights(*results, rtol=0, atol=1e-8)  # shares of tokens are float32
    assert max((results[0][name] - before[name]).abs().max() for name in before) > 1e-3


def test_shortlist_of_the_loss(tmp_path):
    """`loss_vocab_size` keeps the most frequent response ids, adds the batch's own and a sample of the rest, and trains."""
    target = make_target(dtype=torch.float32)
    rows = [{"prompt_ids": [5, 5, 5], "response_ids": [8, 8, 8, 9, 9, 10]}] * 4
    trainer = make_trainer(tmp_path, target, rows=rows, loss_vocab_size=2, loss_negatives=0, preset="eagle")
    labels = torch.tensor([[-100, -100, 100, 9]])
    token_ids, offsets = trainer._loss_tokens(labels)
    assert token_ids.tolist() == [8, 9, 100] and offsets.tolist() == [0, 0, 0]
    trainer.args.loss_negatives = 50
    token_ids, offsets = trainer._loss_tokens(labels)
    sampled = token_ids[3:]
    assert token_ids[:3].tolist() == [8, 9, 100] and not {8, 9, 100} & set(sampled.tolist())
    assert len(sampled) == len(set(sampled.tolist())) and 20 < len(sampled) <= 50
    # each sampled token represents its share of the 125 others
    assert offsets[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(offsets[3:].exp().sum().item(), 125.0, rtol=1e-5, atol=0)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    for size in (0, 128):
        with pytest.raises(ValueError, match=f"loss_vocab_size={size} must be between 1 and 127"):
            make_trainer(tmp_path, target, loss_vocab_size=size)


# Checkpoints ---------------------------------------------------------------------------------------------------


def test_resume_gives_the_uninterrupted_weights(tmp_path):
    target = make_target(dtype=torch.float32)
    # small samples and random negatives, so that the state of the random generators matters
    settings = {
        "rollout_schedule": "1:0.5,3:0.5",
        "csra_max_positions": 6,
        "loss_vocab_size": 16,
        "loss_negatives": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "rows": random_rows(12),
    }
    whole = make_trainer(tmp_path / "whole", target, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", target, quick_drafter(target, seed=99), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same_weights(weights(whole.model), weights(resumed.model), rtol=0, atol=0)
    assert resumed.tokens_seen == whole.tokens_seen
    saved = CoralDraftModel.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert_same_weights(weights(saved), weights(whole.model), rtol=0, atol=0)
    written = {path.name for path in (tmp_path / "whole" / "checkpoint-6").iterdir()}
    written = {name for name in written if not name.endswith(".py")}  # the drafter's code, target_adapter.py among it
    assert not any(name.startswith("pytorch_model") or "target" in name for name in written)


def test_a_nan_gradient_stops_before_the_update(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_target("llama"), save_strategy="steps", save_steps=2, max_steps=5)
    compute_loss, weights = trainer.compute_loss, []

    def spoiled(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if trainer.state.global_step < 3:
            return loss
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return loss * float("nan")

    monkeypatch.setattr(trainer, "compute_loss", spoiled)
    with pytest.raises(FloatingPointError, match=r"step 4 is not finite .*the last checkpoint is .*checkpoint-2"):
        trainer.train()
    assert all(torch.equal(value, weights[0][name]) for name, value in trainer.model.state_dict().items())


def test_only_the_loss_tells_which_batch_was_wrong(tmp_path):
    trainer = make_trainer(tmp_path, make_target("llama"), max_steps=5)
    stop, ids = trainer._finite, torch.arange(12).view(2, 6)
    parameter = next(iter(trainer.model.parameters()))
    for losses, message in (
        ([1.0, float("inf")], r"The loss of step 1 is not finite \(batch 2 of 2: \(2, 6\) ids"),
        ([1.0, 2.0], r"The gradient of step 1 is not finite \(one of these 2 batches: batch 1: .*; batch 2: "),
        ([1.0], r"The gradient of step 1 is not finite \(batch 1: "),
    ):
        for loss in losses:
            stop.note({"input_ids": ids}, torch.tensor(loss))
        parameter.grad = torch.full_like(parameter, float("nan"))
        with pytest.raises(FloatingPointError, match=message + r".*The weights were not updated"):
            stop.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, trainer.model)


def test_deepspeed_meets_no_loss_that_is_not_finite(tmp_path, monkeypatch):
    """Its backward updates the weights, so that a check of gradients would be too late."""
    trainer = make_trainer(tmp_path, make_target("llama"))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    trainer.model.train()
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    assert not trainer.compute_loss(trainer.model, batch).isfinite()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(FloatingPointError, match=r"The loss of step 1 is not finite \(batch 1: \(2, \d+\) ids"):
        trainer.compute_loss(trainer.model, batch)


class MaskSelections(TorchDispatchMode):
    """Counts operations that wait for a device: selections by a mask, whose size is unknown."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        self.count += name == "nonzero" or any(mask is not None and mask.dtype == torch.bool for mask in masks)
        return function(*args, **(kwargs or {}))


def test_deeper_rollouts_select_no_more_rows_by_masks(tmp_path):
    counts = []
    for steps in ("1", "3"):
        trainer = make_trainer(tmp_path, make_target(), preset="hass", rollout_schedule=steps)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        with MaskSelections() as selections:
            trainer.compute_loss(trainer.model.train(), batch).backward()
        counts.append(selections.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(compat._selection is None, reason="this Transformers release keeps all states")
@pytest.mark.parametrize("cached", [False, True])
def test_the_target_keeps_the_states_that_are_read(tmp_path, target, cached):
    """The drafter frees them, and the losses free the last one; also in forwards that fill a feature cache."""
    drafter, seen = quick_drafter(target, target_feature_layers=[1, 2]), []
    target.get_decoder().register_forward_hook(lambda *args: seen.append(args[-1].hidden_states))
    folder = str(tmp_path / "features") if cached else None
    trainer = make_trainer(tmp_path / "run", target, drafter, cache_features=folder, max_steps=1)
    if not cached:
        seen.clear()  # the adapter's own check
    trainer.train()
    assert [state is not None for state in seen[-1]] == [False, True, True, False, True]
