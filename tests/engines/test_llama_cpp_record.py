"""The figures of the llama.cpp server in docs/serving.md are those of the committed record."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "records" / "llama_cpp_server.json").read_text())
RUNS = RECORD["runs"]
NAME = "shipped drafter's layer over three features"


def test_in_float32_texts_and_counts_are_ours():
    assert RUNS["plain, float32"]["equal_to_generate"] == RECORD["prompts"]
    for name in (NAME, "untrained"):
        run = RUNS[f"{name}, float32"]
        assert run["equal_to_plain"] == RECORD["prompts"] and run["llama_cpp"] == run["ours"]
        # the prompt's forward gives each answer's first token
        emitted = RECORD["prompts"] * (RECORD["new_tokens"] - 1)
        assert run["ours"]["steps"] + run["ours"]["accepted"] == emitted


def test_the_page_says_what_was_measured():
    page = " ".join((ROOT / "docs" / "serving.md").read_text().split())
    exact, quantised, plain = RUNS[f"{NAME}, float32"], RUNS[f"{NAME}, Q4_1"], RUNS["plain, Q4_1"]
    counts = exact["llama_cpp"]
    assert f"({RECORD['date']}, xllamacpp {RECORD['xllamacpp']}" in page
    assert (
        f"{counts['steps']} verify steps, {counts['drafted']} drafted and {counts['accepted']} accepted tokens" in page
    )
    assert f"{plain['equal_to_generate']} of {RECORD['prompts']} texts equal plain `generate`'s" in page
    assert f"{quantised['equal_to_plain']} of {RECORD['prompts']} texts equal llama.cpp's own without one" in page
    seconds = plain["cpu_seconds"], plain["generate_cpu_seconds"], quantised["cpu_seconds"]
    assert "take llama.cpp {:.0f} s of CPU time, Transformers in float32 {:.0f} s".format(*seconds[:2]) in page
    assert f"With the drafter, llama.cpp takes {seconds[2]:.0f} s" in page
