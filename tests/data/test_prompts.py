"""Prompt files: names of benchmarks."""

import json

import pytest

from coral_hf.data.prompts import read_prompts


def test_all_names_the_sum_alone(tmp_path):
    """Rows of a benchmark with that name would look like rows of the total."""
    rows = [{"turns": ["a"], "benchmark": "mine"}, {"turns": ["b"], "benchmark": "all"}]
    for name, number, held in (("mixed.jsonl", 2, rows), ("all.jsonl", 1, [{"turns": ["a"]}])):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in held))
        with pytest.raises(ValueError, match=rf'{name}, line {number}: records use "all" for .*another name'):
            read_prompts([path])
    assert [prompt.benchmark for prompt in read_prompts([tmp_path / "mixed.jsonl"], limit=1)] == ["mine"]
