"""Checkpoints that a training does not resume from, and a full disk: a `ValueError` or `OSError` that names the file."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import EVERY_DRAW, assert_same_weights, make_trainer, quick_drafter, random_rows, weights
from transformers.trainer_utils import HPSearchBackend

from coral_hf import CoralDraftModel
from coral_hf.training.run import checkpoints
from coral_hf.training.run.checkpoints import checkpoint_bytes


@pytest.fixture
def trained(tmp_path):
    target = make_target(dtype=torch.float32)
    settings = {**EVERY_DRAW, "max_steps": 2}
    drafter = quick_drafter(target, target_name_or_path="org/one", target_vocab_hash="e" * 64)
    make_trainer(tmp_path, target, drafter, rows=random_rows(16), **settings).train()
    return target, tmp_path, settings


def test_a_wrong_checkpoint_is_refused(trained):
    target, folder, settings = trained
    checkpoint = folder / "checkpoint-2"

    def resume(message, where=checkpoint, drafter=None, rows=None, **changed):
        trainer = make_trainer(folder, target, drafter, rows or random_rows(16), **{**settings, **changed})
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=where)

    resume(r"'/no/such' is not a folder; the last checkpoint is .*checkpoint-2", "/no/such")
    message = "contains no readable trainer_state.json: it is not a checkpoint of a training.*--drafter"
    resume(message, folder.parent, overwrite_output_dir=True)
    resume("is a checkpoint of another drafter: .* has shape .*tensors differ", drafter=quick_drafter(target, "eagle"))
    resume("with another data", rows=random_rows(15))
    resume("with another data", rows=random_rows(16, seed=8))
    resume(r"with another batch \(4, here 8\)", per_device_train_batch_size=8)
    resume(
        r"with another seed \(42, here 7\).* Continue with seed=42, or read the rows again with ignore_data_skip",
        seed=7,
    )
    resume(r"with another seed \(42, here 7\)", data_seed=7)
    resume("with another train_sampling_strategy", train_sampling_strategy="random")
    resume("with another max_length", max_length=1024)
    resume("with another data", packing=True)
    resume(
        r"with another target \('one', here 'other'\)", drafter=quick_drafter(target, target_name_or_path="org/other")
    )
    resume("with another vocabulary", drafter=quick_drafter(target, target_vocab_hash="f" * 64))
    (checkpoint / "optimizer.pt").rename(folder / "kept")
    resume("contains no optimizer.pt, which this training needs")
    (folder / "kept").rename(checkpoint / "optimizer.pt")
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    resume("model.safetensors is damaged")
    (checkpoint / "trainer_state.json").write_text('{"half": ')
    resume("contains no readable trainer_state.json")


@pytest.mark.slow
def test_other_losses_are_told_of_when_going_on(trained, caplog):
    target, folder, settings = trained
    settings = {**settings, "max_steps": 3}
    message = r"continues with other losses: csra_weight=0.5 (0.05 until now), rollout_schedule='3' ('1:0.3,3:0.7' until now)."

    def go_on(**changed):
        caplog.clear()
        trainer = make_trainer(folder, target, rows=random_rows(16), **{**settings, **changed})
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return [record.getMessage() for record in caplog.records if "other losses" in record.getMessage()]

    assert not go_on()
    said = go_on(rollout_schedule="3", csra_weight=0.5)
    assert len(said) == 1 and said[0].endswith(message)
    # another order is one's own wish with ignore_data_skip
    assert not go_on(seed=7, train_sampling_strategy="random", max_length=1024, ignore_data_skip=True)
    # of a version that did not write them down
    path = folder / "checkpoint-2" / "coral_progress.json"
    progress = json.loads(path.read_text())
    for name in ("seed", "train_sampling_strategy", "stream_buffer_size", "packing", "max_length", "recipe"):
        del progress[name]
    path.write_text(json.dumps(progress))
    assert not go_on(seed=7, rollout_schedule="3")


def test_a_full_disk_is_said_before_and_while_writing(trained, monkeypatch):
    target, folder, settings = trained
    usage = shutil.disk_usage(folder)
    trainer = make_trainer(folder, target, rows=random_rows(16), **{**settings, "max_steps": 4})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"has 0 MiB free; a checkpoint needs .* the last checkpoint is .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=True)


def test_only_what_is_saved_needs_space(tmp_path, monkeypatch):
    settings = {**EVERY_DRAW, "max_steps": 2}
    usage, target = shutil.disk_usage(tmp_path), make_target(dtype=torch.float32)
    size = checkpoint_bytes(quick_drafter(target), weights_only=True)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=size))
    with pytest.raises(OSError, match="a checkpoint needs"):
        make_trainer(tmp_path, target, rows=random_rows(16), **settings).train()
    make_trainer(tmp_path, target, rows=random_rows(16), save_only_model=True, **settings).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_a_drafter_that_cannot_be_saved_is_not_lost(trained, tmp_path_factory):
    target, folder, settings = trained
    trainer = make_trainer(folder, target, rows=random_rows(16), overwrite_output_dir=True, **settings)
    trainer.train()
    (folder / "model.safetensors").mkdir()
    message = r"could not be written into .*; the last checkpoint is .*checkpoint-2\. .*save_model\(another_folder\)"
    with pytest.raises(OSError, match=message):
        trainer.save_model()
    other = tmp_path_factory.mktemp("other")
    trainer.save_model(str(other))
    assert_same_weights(weights(trainer.model), weights(CoralDraftModel.from_pretrained(other)), rtol=0, atol=0)


def test_a_failure_that_is_no_write_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_target(dtype=torch.float32), **{**EVERY_DRAW, "max_steps": 2})

    def failing(folder):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", failing)
    with pytest.raises(RuntimeError, match="device-side assert"):
        trainer.train()
    assert not list(tmp_path.iterdir())


def test_the_first_checkpoint_of_a_trial_finds_no_folder(tmp_path):
    """Hyperparameter search writes each trial into its own folder."""
    trainer = make_trainer(tmp_path, make_target(dtype=torch.float32), **{**EVERY_DRAW, "max_steps": 2})
    trainer.train()
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer._save_checkpoint(trainer.model, SimpleNamespace(number=3))
    assert (tmp_path / "run-3" / "checkpoint-2" / "model.safetensors").is_file()
