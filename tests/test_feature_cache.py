"""The feature cache: training from it is training online, and a kill or another target does no harm."""

import copy
import json

import pytest
import torch
from conftest import make_target
from test_trainer import assert_same_weights, make_trainer, random_rows, weights

from coral_hf import TargetAdapter
from coral_hf.training.feature_cache import FeatureCache


def test_cached_features_train_as_online_ones(tmp_path, monkeypatch):
    target = make_target()
    settings = {
        "preset": "hass",
        "rollout_schedule": "3",
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    online = make_trainer(tmp_path, target, **settings)
    compute = TargetAdapter.compute_features
    exact = copy.deepcopy(online.model)
    online.train()

    # The cache keeps bf16: rounding the online features must give the cached training itself.
    monkeypatch.setattr(TargetAdapter, "compute_features", lambda *a, **k: compute(*a, **k).bfloat16())
    rounded = make_trainer(tmp_path, target, copy.deepcopy(exact), **settings)
    rounded.train()

    def cached_training():
        trainer = make_trainer(tmp_path, target, copy.deepcopy(exact), cache_features=str(tmp_path / "c"), **settings)
        trainer.train()
        return weights(trainer.model)

    first = cached_training()
    assert_same_weights(first, weights(rounded.model), rtol=0, atol=1e-11)
    assert_same_weights(first, weights(online.model), rtol=0.05, atol=0.01)

    def refuse(*args, **kwargs):
        raise AssertionError("a filled cache asks the target for nothing")

    monkeypatch.setattr(TargetAdapter, "compute_features", refuse)
    assert_same_weights(cached_training(), first, rtol=0, atol=0)


def test_cache_holds_the_targets_features(tmp_path):
    target = make_target(dtype=torch.float32)
    adapter = TargetAdapter(target, [1, -1])
    rows = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(5)]
    cache = FeatureCache(tmp_path, adapter, "name")
    assert rows[0] not in cache
    cache.fill([*rows[:3], rows[0]], tokens_per_batch=20)
    cache.fill(rows)
    again = FeatureCache(tmp_path, adapter, "name")
    for row in rows:
        assert row in again and again[row].dtype == torch.bfloat16
        expected = adapter.compute_features(row[None])[0].bfloat16()
        torch.testing.assert_close(again[row], expected, rtol=0.02, atol=0.02)
    assert len(list(tmp_path.glob("features-*.safetensors"))) == 2


def test_a_killed_fill_loses_its_last_shard_only(tmp_path):
    target = make_target(dtype=torch.float32)
    adapter = TargetAdapter(target)
    rows = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(4)]
    cache = FeatureCache(tmp_path, adapter, "name")
    cache.fill(rows[:2])
    cache.fill(rows[2:])
    (tmp_path / "features-00001.json").unlink()  # as if killed between weights and index
    again = FeatureCache(tmp_path, adapter, "name")
    assert rows[0] in again and rows[2] not in again
    again.fill(rows)
    assert all(row in FeatureCache(tmp_path, adapter, "name") for row in rows)
    assert {path.name for path in tmp_path.glob("features-*")} == {
        f"features-0000{number}.{kind}" for number in range(2) for kind in ("json", "safetensors")
    }


def test_a_cache_of_another_target_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    FeatureCache(tmp_path, TargetAdapter(target), "name")
    FeatureCache(tmp_path, TargetAdapter(target), "name")
    for adapter, name in (
        (TargetAdapter(make_target(dtype=torch.float32, seed=7)), "name"),
        (TargetAdapter(target), "another name"),
        (TargetAdapter(target, [0, -1]), "name"),
    ):
        with pytest.raises(ValueError, match=r"caches features of .*Use another folder, or delete this one"):
            FeatureCache(tmp_path, adapter, name)
    assert json.loads((tmp_path / "meta.json").read_text())["target"] == "name"
