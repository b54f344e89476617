"""The router stage: the weights it changes, its measurements, and agreement with plain formulas."""

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target
from helpers.tiny_trainings import make_args, measured, random_rows, weights

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.data.dataset import ConversationDataset
from coral_hf.drafter.draft_head import LMHeadRouter
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.losses.router import router_loss, target_group_mass
from coral_hf.training.report.chain_evaluation import even_rows
from coral_hf.training.router_trainer import CoralRouterTrainer
from coral_hf.training.token_clusters import cluster_tokens, start_from_centroids
from coral_hf.training.trainer import CoralTrainer


def make_trainer(folder, target, drafter, **kwargs):
    return CoralRouterTrainer(
        model=drafter,
        target_model=target,
        args=make_args(folder, stage="router", rollout_schedule="3", **kwargs),
        train_dataset=random_rows(16),
        eval_dataset=random_rows(16),  # responses are random: only what was seen can be learnt
    )


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_router_loss_equals_the_plain_formula(chunk_size):
    adapter = TargetAdapter(make_target("gemma3_text"))
    router = LMHeadRouter(32, 128, 7, 8).double()
    features, hidden = torch.randn(2, 10, 32, dtype=torch.float64).unbind(0)
    p = adapter.logits(features).softmax(-1)
    mass, best = target_group_mass(features, adapter.logits, router.group_mass, chunk_size=chunk_size)
    loss = router_loss(router(hidden), mass)
    expected = torch.zeros(10, 7, dtype=torch.float64)
    for token in range(128):
        expected[:, token // router.group_size] += p[:, token]
    torch.testing.assert_close(mass, expected)
    assert torch.equal(best, p.argmax(-1))
    plain = -(expected * router(hidden).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, plain)
    ours = torch.autograd.grad(loss, router.up_proj.weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(plain, router.up_proj.weight)[0])


@pytest.mark.parametrize("grouping", ["consecutive", "clustered"])
def test_only_the_router_moves_and_recall_rises(grouping, tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, dtype=torch.float32)
    drafter.add_router(8, grouping=grouping)
    trainer = make_trainer(tmp_path, target, drafter, num_train_epochs=15)
    trainer.start_router()
    before, target_before = weights(drafter), weights(target)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_uncovered_2"] < first["eval_uncovered_2"]
    assert last["eval_recall_8"] == pytest.approx(1)
    assert abs(last["eval_uncovered_8"]) < 1e-5
    for name, tensor in weights(drafter).items():
        assert torch.equal(tensor, before[name]) != name.startswith(("router.up", "router.down")), name
    for name, tensor in weights(target).items():
        assert torch.equal(tensor, target_before[name]), name
    assert {"recall_1", "uncovered_4", "response_tokens"} <= set(
        trainer.state.log_history[0] | trainer.state.log_history[1]
    )
    trainer.save_model(tmp_path / "saved")
    loaded = CoralDraftModel.from_pretrained(tmp_path / "saved")
    for name, tensor in weights(drafter).items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("schedule", ["1", "3"])
def test_accumulation_gives_the_same_router(schedule, tmp_path):
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        target = make_target(dtype=torch.float64)
        drafter = make_drafter(target)
        torch.manual_seed(0)
        drafter.add_router(8)
        trainer = CoralRouterTrainer(
            model=drafter,
            target_model=target,
            args=make_args(
                tmp_path,
                stage="router",
                rollout_schedule=schedule,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                max_grad_norm=0,
                optim="sgd",
            ),
            train_dataset=random_rows(4),
        )
        trainer.train()
        results.append(weights(drafter.router))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-12, atol=1e-12)


def test_rows_that_fill_up_the_processes_count_nothing(tmp_path):
    target = make_target()
    drafter = make_drafter(target)
    drafter.add_router(8)
    trainer, rows = make_trainer(tmp_path, target, drafter), ConversationDataset(random_rows(5, seed=2))
    expected = measured(trainer.evaluate(rows))
    assert measured(trainer.evaluate(even_rows(rows, 12))) == pytest.approx(expected, rel=1e-6)
    # pooled over rows, whatever the batches
    trainer.args.per_device_eval_batch_size = 1
    assert measured(trainer.evaluate(rows)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("vocab_size", "size"), [(128, 8), (130, 7), (50, 16)])
def test_clusters_hold_like_rows(vocab_size, size):
    order = cluster_tokens(torch.randn(vocab_size, 6), torch.randint(0, 9, (vocab_size,)), size)
    assert torch.equal(order.sort().values, torch.arange(vocab_size))
    # rows around few far centres, none of which splits when it fills whole groups
    centres = 100 * torch.randn(vocab_size // size, 6)
    belongs = torch.arange(vocab_size // size * size) % len(centres)
    rows = centres[belongs] + torch.randn(len(belongs), 6)
    order = cluster_tokens(rows, torch.zeros(len(rows)), size)
    spread = rows[order].view(-1, size, 6).std(1).mean()
    assert spread < 0.7 * rows.view(-1, size, 6).std(1).mean()


@torch.no_grad()
def test_a_router_starts_as_the_groups_mean_rows():
    adapter = TargetAdapter(make_target("granite"))
    counts = torch.randint(0, 50, (128,))
    router = LMHeadRouter(
        32, 128, 7, 33, clustered=True
    ).double()  # rank 16 contains all of 7 groups; one unit left over
    start_from_centroids(router, adapter, counts)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    full, order = adapter.logits(hidden), router.token_order.tolist()
    added = 0.1 / 19  # for every id, so that no group's share is 0
    shares = torch.stack([(counts[order[19 * g : 19 * (g + 1)]] + added).sum() for g in range(7)])
    for group in range(7):
        expected = full[:, order[19 * group : 19 * (group + 1)]].mean(1) + (shares[group] / shares.sum()).log()
        torch.testing.assert_close(router(hidden)[:, group].float(), expected.float(), rtol=1e-4, atol=1e-4)


def test_router_stage_needs_a_router(tmp_path):
    target = make_target(dtype=torch.float32)
    with pytest.raises(ValueError, match="add_router"):
        make_trainer(tmp_path, target, make_drafter(target))
    with pytest.raises(ValueError, match="stage='head'"):
        CoralTrainingArguments(output_dir=str(tmp_path), stage="head")


def test_each_stage_is_of_one_trainer(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    drafter.add_router(8)
    for trainer, name, stage in (
        (CoralTrainer, "CoralTrainer", "router"),
        (CoralRouterTrainer, "CoralRouter", "drafter"),
    ):
        with pytest.raises(ValueError, match=f"stage='{stage}', but {name}.* CoralRouterTrainer for its router"):
            trainer(drafter, target, make_args(tmp_path, stage=stage), random_rows(4))


def test_the_stages_may_follow_each_other(tmp_path, caplog):
    """On one object, in both orders: each stage trains its part and does not change the other."""
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    drafter.add_router(8)
    for stage in ("router", "drafter", "router"):
        trainer_class = CoralRouterTrainer if stage == "router" else CoralTrainer
        before = weights(drafter)
        trainer = trainer_class(
            drafter, target, make_args(tmp_path, stage=stage, rollout_schedule="3"), random_rows(8)
        )
        trainer.train()
        moved = {name for name, value in weights(drafter).items() if not torch.equal(value, before[name])}
        router = {name for name in before if name.startswith("router")}
        assert moved == (router if stage == "router" else before.keys() - router), stage
        said = [record for record in caplog.records if "train it again afterwards" in record.getMessage()]
        assert len(said) == (stage == "drafter")
        caplog.clear()
    # what was frozen on purpose stays frozen
    drafter.requires_grad_(True).norm.requires_grad_(False)
    CoralTrainer(drafter, target, make_args(tmp_path), random_rows(8))
    frozen = {name for name, value in drafter.named_parameters() if not value.requires_grad}
    assert frozen == router | {"norm.weight"}
