"""The low-rank stage: its loss by the plain formula, what it moves, and what it measures."""

from functools import partial

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, randomize
from helpers.tiny_trainings import make_args, measured, random_rows, weights

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.data.dataset import ConversationDataset
from coral_hf.drafter.draft_head import LowRankHead
from coral_hf.training.losses.low_rank import low_rank_loss
from coral_hf.training.low_rank_trainer import CoralLowRankTrainer
from coral_hf.training.report.chain_evaluation import even_rows
from coral_hf.training.router_trainer import CoralRouterTrainer
from coral_hf.training.trainer import CoralTrainer


def make_trainer(folder, target, drafter, **kwargs):
    return CoralLowRankTrainer(
        model=drafter,
        target_model=target,
        args=make_args(folder, stage="low_rank", rollout_schedule="3", **kwargs),
        train_dataset=random_rows(16),
        eval_dataset=random_rows(16),  # outputs are random: what was seen is learnt best
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_the_loss_equals_the_plain_formula(family, chunk_size):
    """Forward KL, its gradients, and what the best ids leave out."""
    adapter = TargetAdapter(make_target(family))
    head = randomize(LowRankHead(32, 128, 5).double())
    hidden = torch.randn(10, 32, dtype=torch.float64)
    logits, factors = partial(head.logits, adapter=adapter), list(head.parameters())
    loss, recall, uncovered = low_rank_loss(hidden, adapter.logits, logits, factors, 7, chunk_size=chunk_size)
    p, q = adapter.logits(hidden).softmax(-1), head.logits(hidden, adapter).softmax(-1)
    plain = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss, plain)
    ours = torch.autograd.grad(3 * loss, factors)
    for gradient, expected in zip(ours, torch.autograd.grad(3 * plain, factors), strict=True):
        torch.testing.assert_close(gradient, expected)
    found, outside = 0, 0.0
    for row in range(10):
        best = q[row].argsort(descending=True)[:7].tolist()
        found += int(p[row].argmax()) in best
        outside += 1 - p[row, best].sum().item()
    assert recall.item() == pytest.approx(found / 10) and uncovered.item() == pytest.approx(outside / 10)
    with torch.no_grad():
        again = low_rank_loss(hidden, adapter.logits, logits, factors, 7, chunk_size=chunk_size)
    assert not again[0].requires_grad and again[0].item() == pytest.approx(loss.item())


def test_a_batch_without_rows():
    adapter, head = TargetAdapter(make_target()), LowRankHead(32, 128, 5).double()
    logits, factors = partial(head.logits, adapter=adapter), list(head.parameters())
    loss, *others = low_rank_loss(torch.zeros(0, 32, dtype=torch.float64), adapter.logits, logits, factors, 7)
    assert [loss.item(), *(value.item() for value in others)] == [0, 0, 0]
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, factors))


def test_only_the_low_rank_head_moves_and_its_loss_falls(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, dtype=torch.float32)
    drafter.add_router(8)
    drafter.add_low_rank_head(target, 6, 12)
    trainer = make_trainer(tmp_path, target, drafter, num_train_epochs=8)
    before, target_before = weights(drafter), weights(target)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert last["eval_uncovered_12"] < first["eval_uncovered_12"]
    assert last["eval_recall_12"] >= first["eval_recall_12"]
    for name, tensor in weights(drafter).items():
        assert torch.equal(tensor, before[name]) != name.startswith("low_rank."), name
    for name, tensor in weights(target).items():
        assert torch.equal(tensor, target_before[name]), name
    assert {"recall_12", "uncovered_12", "response_tokens"} <= set(
        trainer.state.log_history[0] | trainer.state.log_history[1]
    )
    trainer.save_model(tmp_path / "saved")
    loaded = CoralDraftModel.from_pretrained(tmp_path / "saved")
    for name, tensor in weights(drafter).items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert "low-rank head of rank 6, which scores 12 ids exactly" in (tmp_path / "saved" / "README.md").read_text()


def test_accumulation_gives_the_same_head(tmp_path):
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        target = make_target(dtype=torch.float64)
        drafter = make_drafter(target, low_rank_size=6)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        arguments = make_args(
            tmp_path, stage="low_rank", rollout_schedule="3", max_steps=1, max_grad_norm=0, optim="sgd", **sizes
        )
        CoralLowRankTrainer(drafter, target, arguments, random_rows(4)).train()
        results.append(weights(drafter.low_rank))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-12, atol=1e-12)


def test_rows_that_fill_up_the_processes_count_nothing(tmp_path):
    target = make_target()
    trainer = make_trainer(tmp_path, target, make_drafter(target, low_rank_size=6))
    rows = ConversationDataset(random_rows(5, seed=2))
    expected = measured(trainer.evaluate(rows))
    assert measured(trainer.evaluate(even_rows(rows, 12))) == pytest.approx(expected, rel=1e-6)
    trainer.args.per_device_eval_batch_size = 1
    assert measured(trainer.evaluate(rows)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_stages_may_follow_each_other(tmp_path, caplog):
    """On one object: each trains its part and leaves the others as they are."""
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    drafter.add_router(8)
    drafter.add_low_rank_head(target, 6)
    trainers = {"low_rank": CoralLowRankTrainer, "drafter": CoralTrainer, "router": CoralRouterTrainer}
    for stage, trainer_class in trainers.items():
        before = weights(drafter)
        arguments = make_args(tmp_path, stage=stage, rollout_schedule="3", max_steps=2)
        trainer_class(drafter, target, arguments, random_rows(8)).train()
        moved = {name for name, value in weights(drafter).items() if not torch.equal(value, before[name])}
        heads = {name for name in before if name.startswith(("router.", "low_rank."))}
        own = {name for name in heads if name.startswith(f"{stage}.")}
        assert moved == (own if own else before.keys() - heads), stage
        said = [record.getMessage() for record in caplog.records if "train it again afterwards" in record.getMessage()]
        names = ["--stage router", "--stage low_rank"] if stage == "drafter" else []
        assert len(said) == len(names) and all(name in line for name, line in zip(names, said, strict=True))
        caplog.clear()


def test_what_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"stage='low_rank' trains the low-rank head .*drafter\.add_low_rank_head"):
        make_trainer(tmp_path, target, make_drafter(target))
    drafter = make_drafter(target, low_rank_size=6)
    with pytest.raises(
        ValueError, match=r"stage='low_rank', but CoralTrainer .* CoralLowRankTrainer for its low-rank"
    ):
        CoralTrainer(drafter, target, make_args(tmp_path, stage="low_rank"), random_rows(4))
    with pytest.raises(ValueError, match="small low-rank head as it is: leave peft_config out"):
        arguments = make_args(tmp_path, stage="low_rank")
        CoralLowRankTrainer(drafter, target, arguments, random_rows(4), peft_config=object())
