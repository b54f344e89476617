"""Faults: killed trainings resume bit for bit, half-written checkpoints are ignored, wrong ones are refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import (
    EVERY_DRAW,
    assert_same_weights,
    make_args,
    make_trainer,
    quick_drafter,
    random_rows,
    weights,
)
from transformers import TrainerCallback

from coral_hf import CoralDraftModel
from coral_hf.training.run.checkpoints import PARTIAL_FOLDER, LengthGroupedSampler
from coral_hf.training.trainer import CoralTrainer


PROGRAM = Path(__file__).parents[1] / "helpers" / "training_process.py"


def start(options: dict) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(PROGRAM.parents[place]) for place in (2, 1))
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), json.dumps(options)], env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the training did not come so far"
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights of the whole training, run in this process."""
    target = make_target(dtype=torch.float32)
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), target, rows=random_rows(16), **EVERY_DRAW)
    trainer.train()
    return weights(trainer.model), trainer.tokens_seen


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(tmp_path, uninterrupted):
    """SIGKILL at a random moment of a later step, twice, then to the end."""
    output, step_file = tmp_path / "out", tmp_path / "step"
    options = {"output": str(output), "settings": EVERY_DRAW, "step_file": str(step_file)}
    rng = random.Random(os.getpid())
    for resume, at_step in ((None, 3), ("last", 7)):
        process = start({**options, "resume": resume, "seed": 50 + at_step if resume else 1})
        wait_for(lambda at_step=at_step: step_file.exists() and int(step_file.read_text() or 0) >= at_step, process)
        time.sleep(rng.random() * 0.02)
        kill(process)
    finish(start({**options, "resume": "last", "seed": 99}))
    assert_same_weights(uninterrupted[0], weights(CoralDraftModel.from_pretrained(output)), rtol=0, atol=0)
    record = json.loads((output / "training" / "training.json").read_text())
    assert record["response_tokens_seen"] == uninterrupted[1]


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_good_one(tmp_path, uninterrupted):
    output, mark = tmp_path / "out", tmp_path / "saving"
    options = {"output": str(output), "settings": EVERY_DRAW}
    target = make_target(dtype=torch.float32)
    first = make_trainer(output, target, rows=random_rows(16), **EVERY_DRAW)
    stop_after(first, 4)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    process = start({**options, "resume": "last", "slow_save": str(mark)})
    wait_for(mark.exists, process)
    kill(process)
    partial = output / PARTIAL_FOLDER
    assert (partial / "checkpoint-6" / "optimizer.pt").exists(), "killed in the middle"
    assert sorted(path.name for path in output.glob("checkpoint-[0-9]*")) == ["checkpoint-2", "checkpoint-4"]
    trainer = make_trainer(output, target, quick_drafter(target, seed=7), random_rows(16), **EVERY_DRAW)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(uninterrupted[0], weights(trainer.model), rtol=0, atol=0)
    assert not partial.exists()
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]


def stop_after(trainer, step: int) -> None:
    """Trains to a step as if killed right after it."""
    training_step = trainer.training_step

    def stopping(*args, **kwargs):
        if trainer.state.global_step >= step:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    trainer.training_step = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("at_step", range(1, 10))
def test_every_step_can_be_resumed(at_step, tmp_path, uninterrupted):
    target = make_target(dtype=torch.float32)
    settings = {**EVERY_DRAW, "save_steps": 1}
    stop_after(make_trainer(tmp_path, target, rows=random_rows(16), **settings), at_step)
    trainer = make_trainer(tmp_path, target, quick_drafter(target, seed=5), random_rows(16), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at_step}"))
    assert_same_weights(uninterrupted[0], weights(trainer.model), rtol=0, atol=0)
    assert trainer.tokens_seen == uninterrupted[1]


@pytest.mark.slow
def test_resuming_into_an_existing_checkpoint_replaces_it(tmp_path, uninterrupted):
    target = make_target(dtype=torch.float32)
    settings = {**EVERY_DRAW, "save_total_limit": None}
    make_trainer(tmp_path, target, rows=random_rows(16), **settings).train()
    (tmp_path / "checkpoint-6" / "stray").touch()
    trainer = make_trainer(tmp_path, target, quick_drafter(target, seed=5), random_rows(16), **settings)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6" / "stray").exists()
    assert_same_weights(uninterrupted[0], weights(trainer.model), rtol=0, atol=0)


def test_the_best_checkpoint_is_kept_under_its_final_name(tmp_path):
    target = make_target(dtype=torch.float32)
    settings = {**EVERY_DRAW, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    settings |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "acceptance_length",
        "greater_is_better": True,
    }
    trainer = make_trainer(tmp_path, target, rows=random_rows(16), eval_dataset=random_rows(4, seed=3), **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and (best / "optimizer.pt").exists()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert_same_weights(weights(trainer.model), weights(CoralDraftModel.from_pretrained(best)), rtol=0, atol=0)


def test_the_order_of_rows_depends_on_seed_and_epoch(tmp_path):
    def orders(batch, accumulation, **settings):
        trainer = make_trainer(
            tmp_path,
            make_target(dtype=torch.float32),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        sampler = trainer._get_train_sampler()
        assert isinstance(sampler, LengthGroupedSampler) and len(sampler) == 16
        result = []
        for epoch in (0, 1, 0):
            trainer.state.epoch = epoch
            torch.rand(epoch + 3)  # the global generator plays no part
            result.append(list(sampler))
        return result

    first, second, again = orders(8, 1)
    assert first == again != second and sorted(first) == list(range(16))
    assert orders(2, 4) == [first, second, first]
    assert orders(8, 1, seed=7)[0] != first
    assert orders(8, 1, seed=7, data_seed=0) == orders(8, 1, seed=9, data_seed=0)  # 0 is a seed
    trainer = make_trainer(tmp_path, make_target(dtype=torch.float32), train_sampling_strategy="random")
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)


class OutOfMemory(CoralTrainer):
    """A disk with room for two rows."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("found", [True, False])
def test_a_batch_size_that_was_found_is_written_down(found, tmp_path):
    """Training can also resume from it, whether it is found or given."""
    target = make_target(dtype=torch.float32)
    settings = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}

    def trainer(**changed):
        args = make_args(tmp_path, **settings, **changed)
        return OutOfMemory(quick_drafter(target, seed=3), target, args, random_rows(16))

    whole = trainer(auto_find_batch_size=True)
    whole.train()
    assert whole.tokens_seen == whole.train_dataset.num_response_tokens
    progress = json.loads((tmp_path / "checkpoint-4" / "coral_progress.json").read_text())
    assert progress["batch"] == 2
    expected = weights(whole.model)
    again = trainer(auto_find_batch_size=True) if found else trainer(per_device_train_batch_size=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(expected, weights(again.model), rtol=0, atol=0)
    assert again.tokens_seen == whole.tokens_seen


def test_a_checkpoint_between_two_updates_counts_no_batch_twice(tmp_path, uninterrupted):
    """As `enable_jit_checkpoint` writes one, after the next batch has been read."""

    class SaveBetween(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                trainer._save_checkpoint(trainer.model, trial=None)

    target = make_target(dtype=torch.float32)
    trainer = make_trainer(tmp_path, target, rows=random_rows(16), **{**EVERY_DRAW, "save_total_limit": None})
    trainer.add_callback(SaveBetween())
    trainer.train()
    resumed = make_trainer(tmp_path, target, rows=random_rows(16), **EVERY_DRAW)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.tokens_seen == trainer.tokens_seen == uninterrupted[1]
    assert_same_weights(uninterrupted[0], weights(resumed.model), rtol=0, atol=0)


@pytest.mark.slow
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, uninterrupted):
    output = tmp_path / "out"
    options = {"output": str(output), "settings": EVERY_DRAW}
    stop_after(make_trainer(output, make_target(dtype=torch.float32), rows=random_rows(16), **EVERY_DRAW), 2)
    process = start({**options, "resume": "last", "file_limit": 20_000})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "checkpoint-4 could not be written" in errors and "the last checkpoint is" in errors
    assert sorted(path.name for path in output.iterdir()) == ["_coral_run.json", "checkpoint-2"]
    finish(start({**options, "resume": "last"}))
    assert_same_weights(uninterrupted[0], weights(CoralDraftModel.from_pretrained(output)), rtol=0, atol=0)
