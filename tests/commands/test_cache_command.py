"""`coral-hf cache`: lists and clears this package's files only."""

import json

import pytest
from filelock import FileLock

from coral_hf import demo
from coral_hf.cli import main
from coral_hf.generation.costs.files import KeptCosts, write_costs
from coral_hf.generation.tree_size import DraftCosts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path))
    key = {"target": "LlamaForCausalLM", "dtype": "torch.float32", "device": "a CPU", "threads": 2}
    write_costs(key, 256, KeptCosts(DraftCosts((1.0, 2.0), 1.0, 0.5), 0.9, 1.7e9))
    (tmp_path / "draft_costs" / "old.json").write_text('{"key": {"format": 3}, "costs": {}}')
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "model.safetensors").write_bytes(bytes(1_500_000))
    (converted / demo._RECORD).write_text(json.dumps({"name": "org/target"}))
    (tmp_path / "of-the-user").mkdir()
    (tmp_path / "of-the-user" / "notes.txt").write_text("mine")
    return tmp_path


def test_listed_with_sizes_and_dates(cache, capsys):
    before = sorted(cache.rglob("*"))
    assert main(["cache"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    costs, old, target = lines
    assert costs.startswith("costs") and costs.endswith("LlamaForCausalLM, float32, a CPU, 2 threads")
    assert "old.json" in old and "another version" in old
    assert target.startswith("targets") and "1.5 MB" in target and target.endswith("converted  org/target")
    assert all(line[20:].split()[0].count("-") == 2 for line in lines)
    assert last.startswith("3 entries, 1.5 MB") and last.endswith(str(cache))
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize(("kind", "left"), [("costs", {"targets"}), ("targets", {"costs"}), ("all", set())])
def test_cleared(cache, kind, left, capsys):
    assert main(["cache", "--clear", kind]) == 0
    assert capsys.readouterr().out.startswith("removed ")
    assert bool(list((cache / "draft_costs").glob("*.json"))) == ("costs" in left)
    assert (cache / "converted").exists() == ("targets" in left)
    assert (cache / "of-the-user" / "notes.txt").read_text() == "mine"


def test_an_empty_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "none"))
    assert main(["cache"]) == 0 and main(["cache", "--clear", "all"]) == 0
    assert "0 entries, 0 B" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_bad_input(cache, capsys):
    assert main(["cache", "--clear", "everything"]) == 2
    assert "--clear 'everything' is unknown; choose one of costs, targets, all." in capsys.readouterr().err
    with FileLock(cache / "converted.lock"):
        assert main(["cache", "--clear", "targets"]) == 2
    assert "another process is converting" in capsys.readouterr().err
    assert (cache / "converted" / demo._RECORD).exists()
