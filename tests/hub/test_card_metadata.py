"""The figures in a card's metadata, and their names there."""

from helpers.records import add_record, make_record
from huggingface_hub import ModelCard

from coral_hf.hub.model_card import render_card


def test_metadata_is_of_the_drafter(folder):
    """Regardless of other measurements and their order."""
    runs = [row for row in make_record(None)["runs"] if row["method"] != "plain"]
    runs.sort(key=lambda row: row["method"], reverse=True)
    methods = {"lookup": {"prompt_lookup_num_tokens": 3}, "coral": {"draft_top_k": 1}}
    add_record(folder, runs=runs, methods=methods)
    found = {
        (row.dataset_type, row.metric_type): row.metric_value
        for row in ModelCard(render_card(folder)).data.eval_results
    }
    assert found[("gsm8k", "speedup")] == 1.62 and found[("all", "acceptance_length")] == 2.22
    add_record(folder, runs=[row for row in runs if row["method"] == "lookup"], drafters={}, draft_settings={})
    assert "model-index" not in render_card(folder)


def test_sampled_figures_say_so(folder):
    """In the metadata too; if greedy ones were measured, in any order, those are in the metadata."""
    greedy = [row for row in make_record(None)["runs"] if row["method"] == "coral"]
    sampled = [{**row, "temperature": 0.7, "acceptance_length": 2.0} for row in greedy]
    add_record(folder, runs=sampled)
    results = ModelCard(render_card(folder)).data.eval_results
    assert {result.metric_name for result in results} == {
        "tau, tokens per target forward, sampled at temperature 0.7",
        "median speedup, sampled at temperature 0.7",
    }
    assert all(result.metric_args == {"temperature": 0.7} for result in results)
    for runs in ([*greedy, *sampled], [*sampled, *greedy]):
        add_record(folder, runs=runs)
        results = ModelCard(render_card(folder)).data.eval_results
        assert not [result for result in results if "sampled" in result.metric_name or result.metric_args]
        assert {r.metric_value for r in results if r.metric_type == "acceptance_length"} == {2.35, 2.22}
