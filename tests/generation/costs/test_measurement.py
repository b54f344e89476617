"""Costs are measured once, stored, and measured again if the stored ones cannot be used."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target

from coral_hf.generation.costs import measurement
from coral_hf.generation.costs.bench import Bench
from coral_hf.generation.costs.files import FORMAT
from coral_hf.generation.costs.measurement import cost_table, costs_key, measure_costs, measured_sizes
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

    def count(target, drafter, settings, **how):
        calls.append(settings)
        return measure_costs(target, drafter, settings, seconds=0.0, **how)

    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(measurement, "_MIN_ROUNDS", 1)
    monkeypatch.setattr(measurement, "_measured", {})
    monkeypatch.setattr(measurement, "measure_costs", count)
    return calls


def forget(monkeypatch) -> None:
    """The state of a new process."""
    monkeypatch.setattr(measurement, "_measured", {})


def test_measured_once_and_kept(pair, counted, tmp_path, monkeypatch):
    state = torch.get_rng_state()
    costs = cost_table(*pair, SETTINGS)
    assert torch.equal(state, torch.get_rng_state())  # a sampled answer equals that of plain generate
    assert len(costs.target_ms) == 6 and list(costs.target_ms) == sorted(costs.target_ms) and costs.target_ms[0] > 0
    assert costs.first_level_ms > 0 and costs.level_ms >= 0
    assert cost_table(*pair, SETTINGS) is costs and len(counted) == 1
    forget(monkeypatch)
    assert cost_table(*pair, SETTINGS) == costs and len(counted) == 1
    assert [path.suffix for path in (tmp_path / "draft_costs").iterdir()] == [".json"]
    # other sizes, another number of threads, another target: other costs
    cost_table(*pair, DraftSettings(draft_depth=3, draft_top_k=2, draft_total_tokens=7))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    cost_table(*pair, SETTINGS)
    assert len(counted) == 3
    cost_table(*pair, SETTINGS, refresh=True)
    assert len(counted) == 4


def test_two_threads_measure_once(pair, counted, monkeypatch):
    """They would disturb each other's times, and the results are stored on disk."""
    original, running, most = measurement.measure_costs, [], []

    def slowly(*args, **how):
        running.append(1)
        most.append(len(running))
        time.sleep(0.2)
        try:
            return original(*args, **how)
        finally:
            running.pop()

    monkeypatch.setattr(measurement, "measure_costs", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cost_table(*pair, SETTINGS), range(2))
        assert first is second and len(counted) == 1
        list(pool.map(lambda _: cost_table(*pair, SETTINGS, refresh=True), range(2)))
    assert len(counted) == 3 and max(most) == 1


def test_the_key_tells_machines_apart(pair, monkeypatch):
    """Two CPUs of one architecture, the instructions torch uses, and where the drafter is."""
    keys = [costs_key(*pair, SETTINGS)]
    monkeypatch.delattr(os, "uname", raising=False)  # Windows has none
    assert costs_key(*pair, SETTINGS) == keys[0] == json.loads(json.dumps(keys[0]))
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "cpu_name", lambda: "another CPU")
        keys.append(costs_key(*pair, SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another set")
        keys.append(costs_key(*pair, SETTINGS))
    keys.append(costs_key(pair[0], pair[1].to("meta"), SETTINGS))
    assert len({json.dumps(key) for key in keys}) == 4


def test_the_key_tells_low_rank_heads_apart(pair):
    """And stays what it was for drafters without one, whose times were kept before there were any."""
    target, plain = pair
    keys = [costs_key(target, plain, SETTINGS)]
    assert not any("low_rank" in name for name in keys[0]["drafter"])
    for rank, candidates in ((4, 9), (4, 12), (8, 12)):
        drafter = make_drafter(target, low_rank_size=rank, low_rank_candidates=candidates)
        keys.append(costs_key(target, drafter, SETTINGS))
    assert len({json.dumps(key) for key in keys}) == 4


def test_a_shallow_draft_leaves_no_free_levels(pair, counted, monkeypatch):
    """A call of depth 1 times no further level. With its stored times, the levels of a deeper call would cost nothing."""
    shallow, deep, deeper = (DraftSettings(depth, 4, draft_total_tokens=5) for depth in (1, 4, 9))
    assert cost_table(*pair, shallow).level_ms == 0
    forget(monkeypatch)
    cost_table(*pair, deep)
    assert counted == [shallow, deep]
    assert cost_table(*pair, deeper) is cost_table(*pair, deep) and len(counted) == 2  # timed to the same depth


def test_the_key_tells_apart_what_is_computed(pair):
    """The way a router's rows are scored, and active adapters of the target's layers that are not merged."""
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


@pytest.mark.parametrize(
    "damage", ["cut off", "no JSON object", "another key", "another format", "no times", "too few sizes"]
)
def test_what_cannot_be_used_is_measured_again(pair, counted, tmp_path, monkeypatch, damage):
    cost_table(*pair, SETTINGS)
    path = next((tmp_path / "draft_costs").iterdir())
    text = path.read_text()
    content = json.loads(text)
    costs = content["tables"][0]["costs"]
    if damage == "another key":
        content["key"]["torch"] = "1.0"
    elif damage == "another format":
        content["format"] -= 1
    elif damage == "no times":
        costs["level_ms"] = "fast"
    else:
        costs["target_ms"] = costs["target_ms"][:3]
    damaged = {"cut off": text[: len(text) // 2], "no JSON object": "[1]"}.get(damage, json.dumps(content))
    path.write_text(damaged)
    forget(monkeypatch)
    costs = cost_table(*pair, SETTINGS)
    (table,) = json.loads(path.read_text())["tables"]
    assert len(counted) == 2 and table["costs"]["level_ms"] == costs.level_ms


def test_a_cache_that_cannot_be_written_costs_the_next_process_only(pair, counted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "file"))
    cost_table(*pair, SETTINGS)
    forget(monkeypatch)
    cost_table(*pair, SETTINGS)
    assert len(counted) == 2


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3_text"])
def test_every_kind_of_target(family, monkeypatch):
    """A chain and a tree, a window shorter than the prefix, a depth of one."""
    monkeypatch.setattr(measurement, "_MIN_ROUNDS", 1)
    target = make_target(family)
    drafter = make_drafter(target)
    for settings in (SETTINGS, DraftSettings(draft_depth=4), DraftSettings(draft_depth=1, draft_top_k=3)):
        costs = measure_costs(target, drafter, settings, seconds=0.0)
        assert len(costs.target_ms) == settings.draft_total_tokens and costs.first_level_ms > 0


def test_measured_sizes():
    assert measured_sizes(18) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 18]
    assert measured_sizes(2) == [1, 2]


def test_a_measurement_says_what_it_is(pair, counted, caplog, capfd, monkeypatch):
    """One line and a bar, both on stderr, and the next call is silent."""
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    cost_table(*pair, SETTINGS)
    (record,) = caplog.records
    message = record.getMessage()
    assert "at most 20 seconds" in message and "coral-hf cache" in message and "\n" not in message
    shown = capfd.readouterr()
    assert "draft costs" in shown.err and not shown.out
    forget(monkeypatch)
    cost_table(*pair, SETTINGS)
    assert len(caplog.records) == 1 and "draft costs" not in capfd.readouterr().err


class Clock:
    """A machine on which every part takes `seconds`, on a simulated clock."""

    def __init__(self, seconds: float, monkeypatch):
        self.now, self.seconds, self.runs = 0.0, seconds, []
        monkeypatch.setattr(Bench, "verify", lambda bench, tree: self.run(tree.num_nodes))
        monkeypatch.setattr(Bench, "propose", lambda bench, levels: self.run(-levels))
        monkeypatch.setattr(measurement, "synchronized_clock", lambda devices: self.now)
        monkeypatch.setattr(measurement.time, "perf_counter", lambda: self.now)

    def run(self, size):
        self.runs.append(size)
        self.now += self.seconds


WIDE = DraftSettings(draft_depth=4, draft_top_k=4, draft_total_tokens=32)


@pytest.mark.parametrize(("seconds", "least"), [(0.01, 4), (0.7, 1), (3.0, 1), (9.0, 1)])
def test_a_slow_machine_measures_less(pair, seconds, least, monkeypatch):
    """At most 20 seconds, or one pass over the four parts that the costs need."""
    clock = Clock(seconds, monkeypatch)
    costs = measure_costs(*pair, WIDE)
    assert clock.now <= max(20.0, 4 * seconds) + 1e-6
    assert {-1, -4, 1, 32} <= set(clock.runs) and clock.runs.count(32) >= least
    assert len(costs.target_ms) == 32 and costs.target_ms[0] == pytest.approx(1e3 * seconds)
    if seconds == 0.01:
        assert set(clock.runs) == {-1, -4, *measured_sizes(32)}
    else:
        assert len(clock.runs) <= 20 / seconds + 4


@pytest.mark.parametrize(
    ("rows", "levels", "rounds", "sizes"),
    [(4, 4, 3, {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}), (16, 2, 2, {1, 2, 3, 4, 6, 8}), (64, 2, 2, {1, 2})],
)
def test_a_batch_measures_less(pair, rows, levels, rounds, sizes, monkeypatch):
    """Few sizes, and for a large batch two levels and two rounds after the warm-up where a round takes long."""
    clock = Clock(1.5, monkeypatch)
    costs = measure_costs(*pair, WIDE, rows=rows, most_seconds=1e9)
    parts = {-1, -levels, *sizes}
    assert set(clock.runs) == parts and all(clock.runs.count(part) == 1 + rounds for part in parts)
    assert len(costs.target_ms) == 32 and costs.level_ms == 0


def test_a_size_that_was_not_reached_costs_what_the_next_larger_one_does(pair, monkeypatch):
    clock = Clock(0.0, monkeypatch)
    largest = []

    def slower(bench, tree):
        clock.run(tree.num_nodes)
        clock.now += tree.num_nodes / 10
        largest.append(tree.num_nodes)

    monkeypatch.setattr(Bench, "verify", slower)
    costs = measure_costs(*pair, WIDE, most_seconds=6.0)
    reached = sorted(set(largest))
    assert reached != measured_sizes(32) and {1, 32} <= set(reached)
    for size in measured_sizes(32):
        expected = min(other for other in reached if other >= size) * 100
        assert costs.target_ms[size - 1] == pytest.approx(expected)


@pytest.mark.parametrize(("factor", "measured"), [(0.3, 2), (0.6, 1), (1.0, 1), (1.7, 1), (3.0, 2)])
def test_measured_again_where_the_machine_has_plainly_changed(pair, counted, monkeypatch, factor, measured):
    speed, probes = [10.0], []

    def probe(target):
        probes.append(speed[0])
        return speed[0]

    monkeypatch.setattr(measurement, "probe_ms", probe)
    cost_table(*pair, SETTINGS)
    probes.clear()
    speed[0] *= factor
    cost_table(*pair, SETTINGS)
    assert not probes and len(counted) == 1  # just looked
    monkeypatch.setattr(measurement, "CHECK_SECONDS", 0.0)
    cost_table(*pair, SETTINGS)
    assert not probes and len(counted) == 1  # a new measurement is used for a while
    monkeypatch.setattr(measurement, "KEEP_SECONDS", 0.0)
    cost_table(*pair, SETTINGS)
    assert len(counted) == measured
    assert len(probes) == (1 if measured == 1 else 6)  # one that agrees is enough
    # and then that is what it is compared with, in this process and the next
    forget(monkeypatch)
    cost_table(*pair, SETTINGS)
    assert len(counted) == measured


def test_one_slow_forward_is_no_change(pair, counted, monkeypatch):
    monkeypatch.setattr(measurement, "probe_ms", lambda target: 10.0)
    cost_table(*pair, SETTINGS)
    times = iter([90.0, 40.0, 12.0])
    monkeypatch.setattr(measurement, "probe_ms", lambda target: next(times))
    for name in ("CHECK_SECONDS", "KEEP_SECONDS"):
        monkeypatch.setattr(measurement, name, 0.0)
    forget(monkeypatch)
    cost_table(*pair, SETTINGS)
    assert len(counted) == 1 and next(times, None) is None


def test_a_file_has_room_for_other_prefixes(pair, counted, tmp_path, monkeypatch):
    """One file for each pair and machine, a table for each length; measuring one again keeps the others."""
    cost_table(*pair, SETTINGS)
    monkeypatch.setattr(measurement, "PREFIX_LENGTH", 64)
    cost_table(*pair, SETTINGS)
    cost_table(*pair, SETTINGS, refresh=True)
    (path,) = (tmp_path / "draft_costs").iterdir()
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT and [table["prefix"] for table in content["tables"]] == [256, 64]
    forget(monkeypatch)
    monkeypatch.setattr(measurement, "PREFIX_LENGTH", 256)
    cost_table(*pair, SETTINGS)
    assert len(counted) == 3
