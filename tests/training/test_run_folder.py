"""A folder that contains a run: refused, resumed or replaced; `last` is a checkpoint of the latest run."""

import json
import os
import shutil

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import EVERY_DRAW, make_trainer, random_rows

from coral_hf.training.run.run_folder import (
    PROGRESS_FILE,
    RUN_FILE,
    check_run_folder,
    checkpoints,
    last_of_run,
    run_of,
)


SETTINGS = {**EVERY_DRAW, "save_steps": 1, "save_total_limit": 2, "max_steps": 3}
TAKEN = "which this run would replace: .*name another --output_dir, or replace it with --overwrite_output_dir true"


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


def train(folder, target, resume=None, **changed):
    trainer = make_trainer(folder, target, rows=random_rows(16), **{**SETTINGS, **changed})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def names(folder):
    return [path.name for path in checkpoints(folder)]


def without_ids(folder):
    """The files of an older version."""
    (folder / RUN_FILE).unlink(missing_ok=True)
    for path in folder.glob(f"checkpoint-*/{PROGRESS_FILE}"):
        progress = json.loads(path.read_text())
        del progress["run"]
        path.write_text(json.dumps(progress))


def test_a_second_training_leaves_the_first_alone(tmp_path, target):
    train(tmp_path, target, max_steps=3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"contains checkpoint-3 of another run, {TAKEN}"):
        train(tmp_path, target, max_steps=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # also another run's checkpoint does not make it a resumed one
    other = tmp_path.with_name("other")
    train(other, target, max_steps=1)
    with pytest.raises(ValueError, match=TAKEN):
        train(tmp_path, target, str(other / "checkpoint-1"))
    resumed = train(tmp_path, target, "last", max_steps=4)
    assert resumed.state.global_step == 4 and names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert len({run_of(tmp_path), *map(run_of, checkpoints(tmp_path))}) == 1


def test_what_is_overwritten_goes_with_all_its_checkpoints(tmp_path, target):
    train(tmp_path, target, max_steps=6)
    first = run_of(tmp_path)
    trainer = make_trainer(tmp_path, target, rows=random_rows(16), overwrite_output_dir=True, **SETTINGS)
    training_step = trainer.training_step

    def stopping(*args, **kwargs):
        if trainer.state.global_step >= stop:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    trainer.training_step, stop = stopping, 0
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"], "nothing is there yet to replace them"
    stop = 1
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1"] and run_of(tmp_path) not in (None, first)
    assert train(tmp_path, target, "last").state.global_step == 3


def test_last_without_a_checkpoint_is_the_beginning(tmp_path, target, capsys):
    assert train(tmp_path / "new", target, "last", max_steps=2).state.global_step == 2
    told = "contains no checkpoint to resume from: training starts from the beginning"
    assert capsys.readouterr().out.count(told) == 1
    assert train(tmp_path / "new", target, "last", max_steps=3).state.global_step == 3
    assert told not in capsys.readouterr().out


def test_last_is_never_a_checkpoint_of_another_run(tmp_path, target):
    """Also if an older version, or a copy, put two runs into one folder."""
    train(tmp_path / "a", target, max_steps=6)
    train(tmp_path / "b", target, max_steps=2)
    shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    assert last_of_run(tmp_path / "b").name == "checkpoint-2"
    assert train(tmp_path / "b", target, True, max_steps=4).state.global_step == 4
    assert names(tmp_path / "b") == ["checkpoint-3", "checkpoint-4", "checkpoint-6"], "the limit is of its own run"
    for path in (tmp_path / "b").glob("checkpoint-[1-5]"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="contains no checkpoint of the run that wrote it last"):
        check_run_folder(tmp_path / "b", "last")


@pytest.mark.slow
def test_checkpoints_after_the_one_resumed_from_are_of_another_run(tmp_path, target):
    train(tmp_path, target, max_steps=6, save_total_limit=None)
    first = run_of(tmp_path)
    train(tmp_path, target, str(tmp_path / "checkpoint-2"), max_steps=4, save_total_limit=None)
    assert run_of(tmp_path) != first and names(tmp_path)[-1] == "checkpoint-6"
    assert last_of_run(tmp_path).name == "checkpoint-4"


def test_checkpoints_of_before_there_were_ids_resume(tmp_path, target):
    train(tmp_path, target, max_steps=2)
    without_ids(tmp_path)
    with pytest.raises(ValueError, match=TAKEN):
        train(tmp_path, target)
    assert train(tmp_path, target, "last").state.global_step == 3
    assert run_of(tmp_path) == run_of(tmp_path / "checkpoint-3") is not None
    # killed between its first checkpoint and its mark: the newest checkpoint says whose the folder is
    (tmp_path / RUN_FILE).unlink()
    os.utime(tmp_path / "checkpoint-3", (2**32, 2**32))
    assert last_of_run(tmp_path).name == "checkpoint-3"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_folder_with_a_model_or_a_text_is_taken(tmp_path, name):
    (tmp_path / "notes.txt").write_text("of no training")
    assert check_run_folder(tmp_path) is None
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"contains a {name}, {TAKEN}"):
        check_run_folder(tmp_path)
    assert check_run_folder(tmp_path, overwrite=True) is None
