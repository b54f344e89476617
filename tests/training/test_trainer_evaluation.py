"""Evaluations during training: the rows, the sets and the measures."""

from typing import ClassVar

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import logged, make_trainer, measured, quick_drafter, random_rows
from transformers import TrainerCallback

from coral_hf.data.dataset import ConversationDataset
from coral_hf.training.report.chain_evaluation import even_rows


def test_evaluation_loss_is_the_cross_entropy_of_step_1(tmp_path):
    target = make_target()
    trainer = make_trainer(tmp_path, target, eval_dataset=random_rows(5, seed=2))
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(5)])
    outputs, targets, trained = trainer.rollout(trainer.model, batch, 1)
    p = trainer.adapter.logits(targets[trained]).softmax(-1)
    log_q = trainer.adapter.logits(outputs.hidden_states[0][trained]).log_softmax(-1)
    assert metrics["eval_loss"] == pytest.approx(-(p * log_q).sum(-1).mean().item())
    match = (p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert metrics["eval_acceptance_1"] == pytest.approx(match)
    other = trainer.evaluate(eval_dataset=random_rows(3, seed=9), metric_key_prefix="other")
    assert "other_acceptance_length" in other


def test_rows_that_fill_up_the_processes_count_nothing(tmp_path):
    rows = ConversationDataset(random_rows(5, seed=2))
    trainer = make_trainer(tmp_path, make_target(), eval_dataset=rows)
    filled = even_rows(rows, 4)
    assert (len(rows), len(filled), filled.num_response_tokens) == (5, 8, rows.num_response_tokens)
    filled_up = measured(trainer.evaluate(even_rows(rows, 12)))
    assert measured(trainer.evaluate()) == pytest.approx(filled_up, rel=1e-12)


def test_several_evaluation_sets_have_values_of_their_own(tmp_path):
    sets = {"first": random_rows(5, seed=2), "second": random_rows(3, seed=9)}
    trainer = make_trainer(tmp_path, make_target(), eval_dataset=sets, eval_strategy="epoch", num_train_epochs=1)
    trainer.train()
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        alone = trainer.evaluate(rows)
        assert measured(trainer.evaluate(name)) == measured(alone)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"])
        assert logged(trainer, f"eval_{name}_acceptance_length")
    with pytest.raises(ValueError, match=r"no evaluation set 'third'; eval_dataset names \['first', 'second'\]"):
        trainer.evaluate("third")


def test_persistent_workers_read_the_set_that_is_evaluated(tmp_path):
    sets = {"first": random_rows(5, seed=2), "second": random_rows(3, seed=9)}
    found = []
    for settings in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = make_trainer(tmp_path, make_target(), eval_dataset=sets, **settings)
        results = [
            trainer.evaluate(),
            trainer.evaluate("second"),
            trainer.evaluate(random_rows(4)),
            trainer.evaluate(),
        ]
        found.append([measured(metrics) for metrics in results])
    assert found[0] == found[1]
    assert found[0][0] == found[0][3] and found[0][0]["eval_first_loss"] != found[0][0]["eval_second_loss"]
    kept = dict(trainer._kept_loaders)
    trainer.evaluate()
    assert set(kept) == {"first", "second"} and trainer._kept_loaders == kept


def test_an_evaluation_computes_as_the_training_does(tmp_path):
    """In autocast also before a training has prepared the drafter for it."""
    settings = {"bf16": True, "learning_rate": 0.0, "max_steps": 1}
    target = make_target(dtype=torch.bfloat16)
    drafter = quick_drafter(target, dtype=torch.float32)
    trainer = make_trainer(tmp_path, target, drafter, eval_dataset=random_rows(5, seed=2), **settings)
    dtypes = []
    drafter.layers[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert set(dtypes) == {torch.bfloat16}
    assert all(after[name] == before[name] for name in ("eval_loss", "eval_acceptance_1", "eval_acceptance_length"))


def test_an_evaluation_says_how_far_it_is_and_how_fast_it_was(tmp_path):
    class Steps(TrainerCallback):
        lengths: ClassVar[list[int]] = []

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            self.lengths.append(len(eval_dataloader))

    trainer = make_trainer(tmp_path, make_target(), eval_dataset=random_rows(5, seed=2), skip_memory_metrics=False)
    trainer.add_callback(Steps())
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert Steps.lengths == [2, 2]
    seconds = metrics["test_runtime"]
    assert seconds > 0 and "eval_mem_cpu_peaked_delta" in metrics
    assert metrics["test_samples_per_second"] == pytest.approx(5 / seconds, rel=0.01)
    assert metrics["test_steps_per_second"] == pytest.approx(2 / seconds, rel=0.01)
