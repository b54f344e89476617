"""`benchmarks/compare_trainers.py`: what the trainers are given, how a step is measured, what a stopped one leaves."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.engine_drafters import eight_layer_target
from safetensors.torch import load_file


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTINGS = {"batch": 2, "length": 24, "prompt": 6, "steps": 2, "repeats": 1, "threads": 1, "learning_rate": 1e-3}


@pytest.fixture
def scripts(monkeypatch):
    for folder in (BENCHMARKS, BENCHMARKS / "rivals" / "trainers"):
        monkeypatch.syspath_prepend(str(folder))
    import compare_trainers
    import measure_step

    return SimpleNamespace(compare=compare_trainers, worker=measure_step)


def test_the_batch_is_the_targets_own(scripts, tmp_path):
    target = eight_layer_target()
    scripts.compare.write_batch(target, tmp_path, SETTINGS)
    data = load_file(tmp_path / "batch.safetensors")
    states = target(data["input_ids"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(data["features"], torch.cat([states[layer] for layer in (2, 4, 5)], dim=-1))
    torch.testing.assert_close(data["last"], states[-1])
    torch.testing.assert_close(target.model.norm(data["last_before_norm"]), states[-1])
    assert data["loss_mask"].sum(dim=1).tolist() == [18, 18]
    settings = json.loads((tmp_path / "settings.json").read_text())
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())["weight_map"]
    assert settings["layers"] == [2, 4, 5] and settings["embedding_key"] in index and settings["head_key"] in index


@pytest.mark.slow
def test_corals_step_in_a_process_of_its_own(scripts, tmp_path):
    scripts.compare.write_batch(eight_layer_target(), tmp_path, SETTINGS)
    found = scripts.compare.run_worker(sys.executable, "coral", tmp_path, 1)
    assert found["losses"][0] > found["losses"][-1] > 0 and found["trained_parameters"] > 0
    assert found["peak_gib"] > found["peak_above_start_gib"] >= 0
    row = scripts.compare.trainer_row(found, 48, wall=False)
    assert row["tokens_per_cpu_second"] > 0 and "tokens_per_second" not in row and "seconds" not in row


def test_where_a_trainer_stops_is_named(scripts, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "theirs"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def step():\n    import torch\n    torch.zeros(2) @ torch.zeros(3)\n")
    monkeypatch.syspath_prepend(str(package.parent))
    import theirs

    with pytest.raises(RuntimeError) as stop:
        theirs.step()
    found = scripts.worker.where_it_stopped(stop.value, "theirs")
    assert found["at"] == "theirs/__init__.py:3" and found["stopped_by"].startswith("RuntimeError: ")
    assert found["line"] == "torch.zeros(2) @ torch.zeros(3)"


@pytest.mark.slow
def test_a_failed_worker_is_one_error(scripts, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(OSError, match=r"nobody's step failed in .*No module named 'nobody_step'"):
        scripts.compare.run_worker(sys.executable, "nobody", tmp_path, 1)


@pytest.mark.slow
def test_the_worker_needs_no_coral():
    """Rivals' environments have other releases of Transformers, and no coral_hf."""
    for name in ("measure_step", "speculators_step", "specforge_step"):
        text = (BENCHMARKS / "rivals" / "trainers" / f"{name}.py").read_text()
        assert "import coral_hf" not in text and "from coral_hf" not in text
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "rivals" / "trainers" / "measure_step.py")], capture_output=True, check=False
    )
    assert done.returncode  # it asks for a trainer's name
