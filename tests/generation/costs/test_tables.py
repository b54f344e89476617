"""Costs between the measured batch sizes and contexts, and how little is measured for a call."""

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target

from coral_hf.generation.costs import tables
from coral_hf.generation.costs.bench import Bench
from coral_hf.generation.costs.tables import MeasuredCosts, mixed
from coral_hf.generation.key_values.slot_cache import SlotCache
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.slot_drafts import SlotDrafts
from coral_hf.generation.tree_size import DraftCosts


SETTINGS = DraftSettings(draft_depth=3, draft_top_k=2, draft_total_tokens=6)


def table(rows: int, context: int) -> DraftCosts:
    """A machine whose times lie on lines."""
    return DraftCosts(tuple(5.0 + rows * n * 0.5 + rows * context / 100 for n in range(1, 7)), rows, context / 1000)


@pytest.fixture
def asked(monkeypatch):
    """The measurements, by rows and context; each takes `asked.seconds` seconds."""

    class Asked(list):
        seconds, now, known = 1.0, 0.0, set()

    calls = Asked()

    def cost_table(*pair, rows, context, seconds, key):
        if (rows, context) not in calls.known:
            if not seconds:
                return None
            calls.append((rows, context))
            calls.now += min(calls.seconds, seconds)
        return table(rows, context)

    monkeypatch.setattr(tables, "cost_table", cost_table)
    monkeypatch.setattr(tables.time, "monotonic", lambda: calls.now)
    return calls


def costs_of(positions: int) -> MeasuredCosts:
    target = make_target()
    target.config.max_position_embeddings = positions
    return MeasuredCosts(target, make_drafter(target), SETTINGS)


@pytest.fixture
def costs():
    return costs_of(16384)


def test_only_the_nearest_is_measured(costs, asked):
    """One table for an ordinary chat, another after the context has grown."""
    assert costs.at(1, 40) is costs.at(1, 100)  # as long as a block
    assert costs.at(1, 300) == table(1, 256) and asked == [(1, 256)]
    costs.at(1, 700)
    assert asked == [(1, 256), (1, 1024)]
    costs.at(8, 100)
    assert asked[2:] == [(8, 256)]


def close(one: DraftCosts, other: DraftCosts) -> bool:
    return one.target_ms == pytest.approx(other.target_ms) and (one.first_level_ms, one.level_ms) == pytest.approx(
        (other.first_level_ms, other.level_ms)
    )


def test_between_and_beyond_the_measured(costs, asked):
    asked.known = {(rows, context) for rows in (1, 2, 4, 8) for context in (256, 1024, 4096)}
    middle = 128 * 5 + 64  # of a block
    assert close(costs.at(1, 128 * 5 + 3), table(1, middle))
    assert close(costs.at(3, 128 * 5 + 3), table(3, middle))
    assert close(costs.at(6, 128 * 5 + 3), table(6, middle))
    # 8 rows of 4,096 tokens are too many to measure: the line of the shorter contexts is extended
    assert close(costs.at(8, 128 * 40), table(8, 128 * 40 + 64))
    assert not asked


def test_rows_that_leave_need_no_measurement_each(costs, asked):
    for rows in range(8, 0, -1):
        costs.at(rows, 100)
    assert asked == [(8, 256), (4, 256), (2, 256), (1, 256)]


def test_a_call_measures_for_a_bounded_time(costs, asked):
    """After 20 seconds, the nearest known table is used, preferably that of a larger batch."""
    asked.seconds = 9.0
    costs.at(8, 100)
    costs.at(8, 700)
    costs.at(4, 100)
    assert asked.now == pytest.approx(20.0)
    assert costs.at(2, 100) == costs.at(4, 100) and costs.at(3, 100) == costs.at(4, 100)
    assert asked == [(8, 256), (8, 1024), (4, 256)]


def test_slots_measure_for_a_shorter_time(asked):
    """Half of the usual, which a first table may use up; then that table is used for fewer rows too."""
    target = make_target()
    costs = SlotDrafts(SlotCache(target, 8), make_drafter(target)).costs
    asked.seconds = 12.0
    costs.at(8, 100)
    assert asked.now == pytest.approx(10.0)
    assert costs.at(2, 100) == costs.at(8, 100) and len(asked) == 1


def test_a_target_whose_positions_end_early(asked):
    costs_of(4000).at(1, 3900)
    costs_of(200).at(1, 150)
    assert asked == [(1, 1024), (1, 191)]


def test_mixed_never_falls_beyond_the_measured():
    """Noise may make a longer context look cheaper."""
    longer = mixed(table(1, 300), table(1, 200), 3.0)
    assert longer == table(1, 200)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize(("rows", "context"), [(1, 700), (3, 40), (2, 300)])
def test_a_bench_of_any_batch_and_context(family, rows, context):
    """The timed forwards have as many rows and keys as they represent, also if windows have dropped some."""
    target = make_target(family)
    with torch.inference_mode():
        check_bench(target, rows, context)


def check_bench(target, rows: int, context: int) -> None:
    bench = Bench(target, make_drafter(target), SETTINGS, rows, context, 64, 3)
    store = bench.verifier._in_store.store
    for size in (1, 5):
        bench.verify(bench.star(size))
    bench.propose(2)
    bench.propose(1)
    assert store.lengths == [context] * rows and bench.generator.cache.length == context
    for kind in store.kinds.values():
        for buffer in kind.buffers:
            assert buffer.shape[1] == rows and buffer.shape[3] >= context - kind.base
            held = buffer[..., : context - kind.base, :]
            assert bool((held != 0).any(dim=-1).all()), "keys and values of every token"
    assert bench.generator.cache.keys.shape[0] == rows
