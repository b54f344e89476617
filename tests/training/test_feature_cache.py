"""The feature cache: training from it equals training online, and a kill or another target does no harm."""

import copy
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock
from helpers.tiny_models import make_target
from helpers.tiny_trainings import assert_same_weights, make_trainer, random_rows, weights

from coral_hf import TargetAdapter
from coral_hf.training import feature_cache
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
    worker = pickle.loads(pickle.dumps(again))  # as a data loader's worker gets it
    for row in rows:
        assert row in again and again[row].dtype == torch.bfloat16
        assert torch.equal(worker[row], again[row])
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
        with pytest.raises(ValueError, match=r"contains features of .*Use another folder, or delete this one"):
            FeatureCache(tmp_path, adapter, name)
    assert json.loads((tmp_path / "meta.json").read_text())["target"] == "name"


def filled(folder, count=6):
    adapter = TargetAdapter(make_target(dtype=torch.float32))
    rows = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(count)]
    cache = FeatureCache(folder, adapter, "name")
    for start in range(0, count, 2):
        cache.fill(rows[start : start + 2])
    return adapter, rows


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "index", "cut index"])
def test_a_damaged_shard_is_computed_again(harm, tmp_path, capsys):
    adapter, rows = filled(tmp_path)
    expected = [FeatureCache(tmp_path, adapter, "name")[row].clone() for row in rows]
    shard, data = tmp_path / "features-00001.safetensors", (tmp_path / "features-00001.safetensors").read_bytes()
    if harm == "flip":
        shard.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif harm == "cut":
        shard.write_bytes(data[:-100])
    elif harm == "remove":
        shard.unlink()
    elif harm == "cut index":
        index = shard.with_suffix(".json")
        index.write_text(index.read_text()[:40])
    else:
        record = json.loads(shard.with_suffix(".json").read_text())
        shard.with_suffix(".json").write_text(json.dumps({**record, "sha256": "0"}))
    cache = FeatureCache(tmp_path, adapter, "name")
    cache.fill(rows)
    assert "features-00001 damaged (checksum)" in capsys.readouterr().out
    for row, features in zip(rows, expected, strict=True):
        torch.testing.assert_close(cache[row], features, rtol=0.02, atol=0.02)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [f"features-0000{n}.json" for n in range(3)] + [
        "meta.json"
    ], "the hole is filled; other shards are untouched"
    assert FeatureCache(tmp_path, adapter, "name").drop_damaged() == []


def test_the_forecast_comes_first_and_a_full_disk_is_refused(tmp_path, monkeypatch, capsys):
    adapter = TargetAdapter(make_target(dtype=torch.float32))
    rows = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(6)]
    cache = FeatureCache(tmp_path, adapter, "name")
    tokens = sum(map(len, rows))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=tokens * 32 * 2))
    with pytest.raises(ValueError, match=r"GiB free; the features need .* Use another disk, fewer rows"):
        cache.fill(rows)
    assert not list(tmp_path.glob("features-*"))
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    written = []
    monkeypatch.setattr(FeatureCache, "write_shard", lambda self, *a: written.append(capsys.readouterr().out))
    cache.fill(rows)
    assert f"(forecast): {tokens:,} tokens" in written[0]
    assert "GiB in" in written[0] and "hours at" in written[0]


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path, monkeypatch):
    adapter, rows = filled(tmp_path, 4)
    more = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(4, seed=9)]

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(feature_cache, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.* the 4 rows cached so far are kept"):
        FeatureCache(tmp_path, adapter, "name").fill([*rows, *more])
    assert sorted(tmp_path.iterdir()) == before


def test_two_trainings_do_not_write_into_one_cache(tmp_path):
    adapter, rows = filled(tmp_path / "cache", 4)
    more = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(4, seed=9)]
    cache = FeatureCache(tmp_path / "cache", adapter, "name")
    with FileLock(tmp_path / "cache.lock"):
        cache.fill(rows)  # all there: nothing is written
        with pytest.raises(ValueError, match=r"another training is writing features to .*cache: wait for it"):
            cache.fill([*rows, *more])
        assert not any(row in cache for row in more)
    cache.fill([*rows, *more])
    assert all(row in cache for row in more)


def fill_together(caches, rows):
    barrier = threading.Barrier(len(caches), timeout=60)
    with ThreadPoolExecutor(len(caches)) as pool:
        options = {"world_size": len(caches), "barrier": barrier.wait}
        runs = [pool.submit(cache.fill, rows, rank=rank, **options) for rank, cache in enumerate(caches)]
        for run in runs:
            run.result()


def test_processes_share_the_work(tmp_path):
    adapter = TargetAdapter(make_target(dtype=torch.float32))
    rows = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(7)]
    caches = [FeatureCache(tmp_path, adapter, "name") for _ in range(2)]
    fill_together(caches, rows)
    for cache in caches:
        cache.refresh()
        assert all(row in cache for row in rows)
    found = [len(json.loads(path.read_text())["rows"]) for path in sorted(tmp_path.glob("features-*.json"))]
    assert sorted(found) == [3, 4]


def test_processes_divide_what_the_first_found_damaged(tmp_path):
    adapter, rows = filled(tmp_path, 4)
    shard = tmp_path / "features-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    more = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in random_rows(3, seed=9)]
    fill_together([FeatureCache(tmp_path, adapter, "name") for _ in range(2)], [*rows, *more])
    cache = FeatureCache(tmp_path, adapter, "name")
    assert cache.drop_damaged() == [] and all(row in cache for row in [*rows, *more])
    stored = [len(json.loads(path.read_text())["rows"]) for path in tmp_path.glob("features-*.json")]
    assert sum(stored) == 7, "no row is computed twice"


def test_processes_begin_one_cache_together(tmp_path):
    adapter = TargetAdapter(make_target(dtype=torch.float32))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: FeatureCache(tmp_path, adapter, "name"), range(32)))
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]
