"""Weights that the package writes can be read by anyone who may read their config."""

import os
from functools import partial

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target
from helpers.tiny_trainings import make_args, random_rows

from coral_hf.commands.convert import import_checkpoint
from coral_hf.conversion import export_drafter
from coral_hf.conversion.engine_export import ENGINES
from coral_hf.drafter.weight_files import follow_umask
from coral_hf.training.trainer import CoralTrainer


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request):
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def save(folder):
    make_drafter(make_target(dtype=torch.float32)).save_pretrained(folder / "saved")


def save_in_shards(folder):
    make_drafter(make_target(dtype=torch.float32)).save_pretrained(folder / "saved", max_shard_size="10KB")


def export(engine, folder):
    target = make_target(dtype=torch.float32)
    layers = {"shape": "eagle"} if engine == "eagle" else {"shape": "eagle3", "target_feature_layers": [1, 2, 3]}
    drafter = make_drafter(target, **layers)
    export_drafter(drafter, engine, folder / "out", target, target_name="org/target")


def convert(folder):
    from helpers.eagle_checkpoints import LLAMA, eagle1_tensors, write

    checkpoint = write(folder.parent / f"{folder.name}-eagle", LLAMA, eagle1_tensors())
    import_checkpoint("eagle", str(checkpoint), folder / "out", make_target(dtype=torch.float32))


def train(folder, **settings):
    target = make_target(dtype=torch.float32)
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    args = make_args(folder / "run", cache_features=str(folder / "features"), **saving)
    trainer = CoralTrainer(
        model=make_drafter(target), target_model=target, args=args, train_dataset=random_rows(6), **settings
    )
    trainer.train()
    trainer.save_model()


def train_adapters(folder):
    peft = pytest.importorskip("peft")
    train(folder, peft_config=peft.LoraConfig(r=2))


WRITERS = {
    "save_pretrained": save,
    "shards": save_in_shards,
    **{f"export to {engine}": partial(export, engine) for engine in ENGINES},
    "convert from eagle": convert,
    "train": train,
    "train adapters": train_adapters,
}


@pytest.mark.parametrize("writer", list(WRITERS))
def test_weights_follow_the_umask(writer, mode, tmp_path):
    folder = tmp_path / "written"
    folder.mkdir()
    WRITERS[writer](folder)
    modes = {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in folder.rglob("*.safetensors")}
    assert modes == dict.fromkeys(modes, oct(mode)) and modes
    assert not list(folder.rglob(".mode-*"))


def test_nothing_is_left_where_there_are_no_weights(tmp_path):
    follow_umask(tmp_path)
    follow_umask(tmp_path / "absent")
    assert not list(tmp_path.iterdir())
