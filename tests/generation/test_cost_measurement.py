"""Costs are measured once, kept, and measured again when what is kept cannot be used."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target

from coral_hf.generation import cost_measurement
from coral_hf.generation.cost_measurement import costs_key, draft_costs, measure_costs, measured_sizes
from coral_hf.generation.settings import DraftSettings


SETTINGS = DraftSettings(draft_depth=3, draft_top_k=2, draft_total_tokens=6)


@pytest.fixture
def pair():
    target = make_target()
    return target, make_drafter(target)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Measuring one round only, in a cache of its own; the list grows by one per measurement."""
    calls = []

    def count(target, drafter, settings):
        calls.append(settings)
        return measure_costs(target, drafter, settings, seconds=0.0)

    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(cost_measurement, "_MIN_ROUNDS", 1)
    monkeypatch.setattr(cost_measurement, "_measured", {})
    monkeypatch.setattr(cost_measurement, "measure_costs", count)
    return calls


def forget(monkeypatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(cost_measurement, "_measured", {})


def test_measured_once_and_kept(pair, counted, tmp_path, monkeypatch):
    state = torch.get_rng_state()
    costs = draft_costs(*pair, SETTINGS)
    assert torch.equal(state, torch.get_rng_state())  # a sampled answer stays plain's
    assert len(costs.target_ms) == 6 and list(costs.target_ms) == sorted(costs.target_ms) and costs.target_ms[0] > 0
    assert costs.first_level_ms > 0 and costs.level_ms >= 0
    assert draft_costs(*pair, SETTINGS) is costs and len(counted) == 1
    forget(monkeypatch)
    assert draft_costs(*pair, SETTINGS) == costs and len(counted) == 1
    assert [path.suffix for path in (tmp_path / "draft_costs").iterdir()] == [".json"]
    # other sizes, another number of threads, another target: other costs
    draft_costs(*pair, DraftSettings(draft_depth=3, draft_top_k=2, draft_total_tokens=7))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    draft_costs(*pair, SETTINGS)
    assert len(counted) == 3
    draft_costs(*pair, SETTINGS, refresh=True)
    assert len(counted) == 4


def test_two_threads_measure_once(pair, counted, monkeypatch):
    """They would time each other, and what is found is kept on the disk."""
    original, running, most = cost_measurement.measure_costs, [], []

    def slowly(*args):
        running.append(1)
        most.append(len(running))
        time.sleep(0.2)
        try:
            return original(*args)
        finally:
            running.pop()

    monkeypatch.setattr(cost_measurement, "measure_costs", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: draft_costs(*pair, SETTINGS), range(2))
        assert first is second and len(counted) == 1
        list(pool.map(lambda _: draft_costs(*pair, SETTINGS, refresh=True), range(2)))
    assert len(counted) == 3 and max(most) == 1


def test_the_key_tells_machines_apart(pair, monkeypatch):
    """Two CPUs of one architecture, the instructions torch uses, and where the drafter is."""
    keys = [costs_key(*pair, SETTINGS)]
    monkeypatch.delattr(os, "uname", raising=False)  # Windows has none
    assert costs_key(*pair, SETTINGS) == keys[0] == json.loads(json.dumps(keys[0]))
    with monkeypatch.context() as patch:
        patch.setattr(cost_measurement, "cpu_name", lambda: "another CPU")
        keys.append(costs_key(*pair, SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another set")
        keys.append(costs_key(*pair, SETTINGS))
    keys.append(costs_key(pair[0], pair[1].to("meta"), SETTINGS))
    assert len({json.dumps(key) for key in keys}) == 4


def test_a_shallow_draft_leaves_no_free_levels(pair, counted, monkeypatch):
    """A call of depth 1 times no further level: what it keeps would make those of a deeper call cost nothing."""
    shallow, deep, deeper = (DraftSettings(depth, 4, draft_total_tokens=5) for depth in (1, 4, 9))
    assert draft_costs(*pair, shallow).level_ms == 0
    forget(monkeypatch)
    draft_costs(*pair, deep)
    assert counted == [shallow, deep]
    assert draft_costs(*pair, deeper) is draft_costs(*pair, deep) and len(counted) == 2  # timed to the same depth


def test_the_key_tells_apart_what_is_computed(pair):
    """How a router's rows are scored, and adapters beside the target's layers: not merged, not switched off."""
    peft = pytest.importorskip("peft")
    target, drafter = pair
    keys = [costs_key(target, drafter, replace(SETTINGS, draft_scoring=way)) for way in ("active", "router")]
    adapted = peft.get_peft_model(target, peft.LoraConfig(r=4, target_modules="all-linear"))
    keys.append(costs_key(target, drafter, SETTINGS))
    adapted.add_adapter("wide", peft.LoraConfig(r=8, target_modules="all-linear"))
    adapted.set_adapter("wide")
    keys.append(costs_key(target, drafter, SETTINGS))
    assert len({json.dumps(key) for key in keys}) == 4
    with adapted.disable_adapter():
        assert costs_key(target, drafter, SETTINGS) == keys[0]
    adapted.merge_adapter()
    assert costs_key(target, drafter, SETTINGS) == keys[0]


@pytest.mark.parametrize("damage", ["cut off", "no JSON object", "another key", "no times", "too few sizes"])
def test_what_cannot_be_used_is_measured_again(pair, counted, tmp_path, monkeypatch, damage):
    draft_costs(*pair, SETTINGS)
    path = next((tmp_path / "draft_costs").iterdir())
    text = path.read_text()
    content = json.loads(text)
    if damage == "another key":
        content["key"]["torch"] = "1.0"
    elif damage == "no times":
        content["costs"]["level_ms"] = "fast"
    else:
        content["costs"]["target_ms"] = content["costs"]["target_ms"][:3]
    damaged = {"cut off": text[: len(text) // 2], "no JSON object": "[1]"}.get(damage, json.dumps(content))
    path.write_text(damaged)
    forget(monkeypatch)
    costs = draft_costs(*pair, SETTINGS)
    assert len(counted) == 2 and json.loads(path.read_text())["costs"]["level_ms"] == costs.level_ms


def test_a_cache_that_cannot_be_written_costs_the_next_process_only(pair, counted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "file"))
    draft_costs(*pair, SETTINGS)
    forget(monkeypatch)
    draft_costs(*pair, SETTINGS)
    assert len(counted) == 2


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3_text"])
def test_every_kind_of_target(family, monkeypatch):
    """A chain and a tree, a window shorter than the prefix, a depth of one."""
    monkeypatch.setattr(cost_measurement, "_MIN_ROUNDS", 1)
    target = make_target(family)
    drafter = make_drafter(target)
    for settings in (SETTINGS, DraftSettings(draft_depth=4), DraftSettings(draft_depth=1, draft_top_k=3)):
        costs = measure_costs(target, drafter, settings, seconds=0.0)
        assert len(costs.target_ms) == settings.draft_total_tokens and costs.first_level_ms > 0


def test_measured_sizes():
    assert measured_sizes(18) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 18]
    assert measured_sizes(2) == [1, 2]
