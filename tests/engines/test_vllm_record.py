"""The figures of vLLM servers in README and the manual are those of the committed records."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "records" / "vllm_server.json").read_text())
REGENERATED = json.loads((ROOT / "benchmarks" / "records" / "vllm_regenerate.json").read_text())
FORMS = ("shipped drafter, vllm", "shipped drafter, speculators")


def plain_text(page):
    return " ".join((ROOT / page).read_text().split())


def test_the_record_holds_both_forms_of_export():
    for name in FORMS:
        run = RECORD["runs"][name]
        assert run["equal_texts"] + len(run["near_ties"]) == RECORD["prompts"]
        assert all(tie["gap"] < 1e-3 for tie in run["near_ties"])
        for counter, ours in run["ours"].items():
            assert abs(run["vllm"][counter] - ours) <= max(1, 0.01 * ours)


def test_the_pages_say_what_was_measured():
    run = RECORD["runs"][FORMS[0]]
    drafts, accepted, ours = run["vllm"]["num_drafts"], run["vllm"]["num_accepted_tokens"], run["ours"]["num_drafts"]
    served = f"served by vLLM {RECORD['vllm']} on a CPU: {run['equal_texts']} of {RECORD['prompts']} texts were equal to plain"
    assert served in plain_text("README.md")
    serving = plain_text("docs/serving.md")
    assert f"({RECORD['date']}, vLLM {RECORD['vllm']}" in serving
    assert f"{drafts} verify steps where our own chain takes {ours}" in serving
    assert f"counts {1 + accepted / drafts:.2f}" in serving
    answered = RECORD["prompts"] * (RECORD["new_tokens"] - 1)  # the prompt's forward gives each answer's first token
    assert f"{answered / drafts:.2f} by the tokens of the answers" in serving


def test_regenerated_answers_are_the_local_ones():
    runs, answers = REGENERATED["runs"], REGENERATED["answers"]
    for mode in ("ids", "texts"):
        killed = runs[f"killed, {mode}"]
        assert 0 < killed["on_file"] == killed["resumed"] == answers - killed["new"] < answers
    assert (
        runs["ids"]["equal"] + len(runs["ids"]["near_ties"]) == answers
        and runs["texts"]["equal"] == runs["ids"]["equal"]
    )
    assert all(tie["gap"] < 1e-3 for tie in runs["ids"]["near_ties"])
    page = plain_text("docs/training.md")
    assert f"A vLLM {REGENERATED['vllm']} server on a CPU ({REGENERATED['date']}, float32, greedy;" in page
    assert f"gave {runs['ids']['equal']} of {answers} answers with the ids and texts of local regeneration" in page
