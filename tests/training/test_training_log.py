"""The log of a training: means over unequal batches, chain length per entry, the curve, and report_to."""

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import logged, make_trainer, random_rows
from transformers import TrainerCallback

from coral_hf.training.report.learning_curve import CURVE_FILE, draw_learning_curve, series
from coral_hf.training.report.metrics import WeightedMeans, chain_length


class OneProcess:
    num_processes = 1


def test_means_weigh_batches_by_their_rows():
    means = WeightedMeans()
    assert not means
    means.add({"a": (torch.tensor(1.0), torch.tensor(3)), "b": (torch.tensor(5.0), torch.tensor(0))})
    means.add({"a": (torch.tensor(5.0), torch.tensor(1))})
    assert means and means.drain(OneProcess()) == {"a": 2.0, "b": 0.0}
    assert not means and means.drain(OneProcess()) == {}


def test_chain_length_by_hand():
    assert chain_length({"acceptance_1": 0.5, "acceptance_2": 0.4, "loss": 9.0}) == pytest.approx(1 + 0.5 + 0.2)
    assert chain_length({"recall_1": 0.5}) is None


class Reporter(TrainerCallback):
    """A callback that receives every entry, like the integrations of `report_to`."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(logs)


@pytest.mark.slow
def test_the_log_shows_every_rollout_step_and_reports_it(tmp_path):
    pytest.importorskip("matplotlib")
    target, rows = make_target(dtype=torch.float32), random_rows(16)
    settings = {"rollout_schedule": "3", "eval_strategy": "epoch", "logging_steps": 2, "learning_curve": True}
    trainer = make_trainer(tmp_path, target, rows=rows, eval_dataset=random_rows(4, seed=3), **settings)
    reporter = Reporter()
    trainer.add_callback(reporter)
    trainer.train()
    entries = [entry for entry in reporter.entries if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        for step in (1, 2, 3):
            assert all(f"{name}_{step}" in entry for name in ("classification", "regression", "acceptance"))
        assert entry["acceptance_length"] == pytest.approx(chain_length(entry))
    assert len(logged(trainer, "eval_acceptance_length")) == 2
    picture = (tmp_path / CURVE_FILE).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_a_picture_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(tmp_path, make_target(dtype=torch.float32), max_steps=2, learning_curve=True)
    (tmp_path / CURVE_FILE).mkdir(parents=True)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [record for record in caplog.records if "training continues" in record.getMessage()]


def test_the_curves_points(tmp_path):
    history = [
        {"step": 1, "acceptance_1": 0.5, "acceptance_length": 1.5, "classification_1": 3.0},
        {"step": 2, "eval_acceptance_1": 0.6, "eval_acceptance_length": 1.7},
    ]
    found = series(history, "acceptance_", also="eval_acceptance_")
    assert found == {"acceptance_1": [(1, 0.5)], "eval_acceptance_1": [(2, 0.6)]}
    pytest.importorskip("matplotlib")
    assert draw_learning_curve([{"step": 1, "train_runtime": 3.0}], tmp_path / "none.png") is None
    assert draw_learning_curve(history, tmp_path / "some.png").exists() and not (tmp_path / "none.png").exists()


def test_tensorboard_holds_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    make_trainer(tmp_path, make_target(dtype=torch.float32), rollout_schedule="3", report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/acceptance_3", "train/classification_1", "train/acceptance_length"} <= names
