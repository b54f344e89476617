"""docs/rival_tables.py makes its tables of the records that the scripts write, with and without times by the clock."""

from pathlib import Path

import pytest


ENVIRONMENT = {"device": "CPU", "dtype": "float32", "threads": 1, "commit": "abc"}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import rival_tables

    def of(record):
        monkeypatch.setattr(rival_tables, "read", lambda path: record)
        return rival_tables

    return of


def method(**times):
    return {"identical": 2, "steps": 10, "tokens_per_step": 1.5, **times}


def test_each_rival_has_its_fastest_settings(tables):
    rows = {
        "plain": method(cpu_seconds=3.0, seconds=2.0),
        "coral": method(cpu_seconds=2.0, seconds=1.0),
        "coral chain": method(cpu_seconds=2.0, seconds=1.6),
        "prompt_lookup: 3 after 2-grams": method(cpu_seconds=2.0, seconds=2.0),
        "prompt_lookup: 5 after 2-grams": method(cpu_seconds=1.0, seconds=4.0),
    }
    fastest = {"prompt_lookup": "prompt_lookup: 5 after 2-grams"}
    found = {"n_prompts": 2, "fastest": fastest, "methods": rows}
    record = {"environment": ENVIRONMENT, "new_tokens": 8, "draft_depth": 3}
    record["rivals"] = dict.fromkeys(list(rows)[3:], "transformers 5.24.0")
    record["benchmarks"] = dict.fromkeys(("mt_bench", "humaneval", "gsm8k"), found)
    text = tables(record).methods()
    assert "| **CORAL, the shipped drafter** | 2.00x | 1.50 | 2.00x | 1.50 | 2.00x | 1.50 | 6 |" in text
    assert "| the same drafter, chain of 3 | 1.25x |" in text and "by CPU time" not in text
    assert "| `prompt_lookup`, transformers 5.24.0 (5 after 2-grams) | 0.50x |" in text
    assert "To run this drafter" not in text
    record["adapted"] = {"prompt_lookup": ["norm_output"]}
    assert (
        text + "\n\nTo run this drafter, adapters changed these packages in memory: `prompt_lookup` (norm_output)."
        == tables(record).methods()
    )
    for row in rows.values():
        del row["seconds"]
    text = tables(record).methods()
    assert "| **CORAL, the shipped drafter** | 1.50x |" in text and "by CPU time" in text


def test_trainers_and_where_they_stop(tables):
    row = {"peak_gib": 1.26, "peak_above_start_gib": 0.5, "tokens_per_cpu_second": 1234.4, "changed": []}
    theirs = {**row, "version": "theirs 1.0", "tokens_per_second": 999.6, "changed": ["no GPU", "float32"]}
    theirs["published"] = {"stopped_by": "RuntimeError: no driver", "at": "theirs/loss.py:7", "line": "run()"}
    record = {"environment": ENVIRONMENT, "steps": 3, "batch": 1, "length": 1024, "target": "org/target"}
    record["trainers"] = {"coral": {**row, "tokens_per_second": 2000.0}, "theirs": theirs}
    text = tables(record).trainers()
    assert "| `CoralTrainer` | 2,000 | 1.3 GiB | 0.50 GiB |\n| theirs 1.0 | 1,000 |" in text
    assert "theirs 1.0 unchanged stops at `theirs/loss.py:7` (RuntimeError)" in text
    assert "- theirs 1.0: no GPU; float32." in text
    del theirs["tokens_per_second"], record["trainers"]["coral"]["tokens_per_second"]
    assert "| theirs 1.0 | 1,234 |" in tables(record).trainers()
