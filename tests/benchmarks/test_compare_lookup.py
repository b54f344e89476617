"""The comparison with and without lookup nodes: a row for each file and size, and its records of the demo pair."""

import json
import runpy

import pytest
from helpers.scripts import BENCHMARKS
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf.data.prompts import Prompt
from coral_hf.generation.lookup.lookup_nodes import PRIOR
from coral_hf.generation.tree_size import isotonic


@pytest.mark.slow
def test_rows():
    script = runpy.run_path(str(BENCHMARKS / "compare_lookup.py"))
    target = make_target()
    prompts = [Prompt("a", "loops", ("abcabcabcabc",)), Prompt("b", "other", ("hello",))]
    rows = script["compare"](target, make_tokenizer(), make_drafter(target), prompts, 24)
    assert [(row["benchmark"], row["size"]) for row in rows] == [
        (benchmark, size) for benchmark in ("loops", "other") for size in script["SIZES"]
    ]
    for row in rows:
        assert row["tau"] >= 1 and row["tau_with_lookup"] >= 1 and 0 <= row["steps_without_a_draft"] <= 1
        assert row["ratio"] == pytest.approx(row["tau_with_lookup"] / row["tau"], abs=1e-3)


def test_the_records_show_a_gain_where_answers_repeat_their_prompts():
    for name in ("cnn_dm", "humaneval"):
        record = json.loads((BENCHMARKS / "records" / "lookup" / f"{name}.json").read_text())
        assert record["environment"]["dtype"] == "float32" and min(row["ratio"] for row in record["rows"]) > 1


def test_the_prior_is_what_was_counted():
    counted = json.loads((BENCHMARKS / "records" / "lookup" / "prior.json").read_text())["rates"]
    rates = isotonic([row["rate"] for row in counted], [row["matches"] for row in counted])
    assert list(PRIOR) == pytest.approx(rates, abs=0.0051)


def test_matches_are_counted_by_length():
    script = runpy.run_path(str(BENCHMARKS / "fit_lookup.py"))
    rows = script["count"]([{"prompt_ids": [1, 2, 3], "response_ids": [1, 2, 3, 4]}])
    # after 1, 2 the text says 3, after 1, 2, 3 it says 1
    assert [(row["matches"], row["rate"]) for row in rows[:3]] == [(1, 1.0), (1, 0.0), (0, 0.0)]


@pytest.mark.parametrize("name", ["cnn_dm", "humaneval", "mt_bench"])
def test_the_page_has_the_records_figures(name):
    page = (BENCHMARKS.parent / "docs" / "experiments.md").read_text()
    for row in json.loads((BENCHMARKS / "records" / "lookup" / f"{name}.json").read_text())["rows"]:
        figures = f"{row['tau']:.2f} | {row['tau_with_lookup']:.2f} | {row['ratio']:.2f}"
        assert f"| {name} | {row['size']} | {figures} | {row['steps_without_a_draft']:.0%}".replace("%", " %") in page
