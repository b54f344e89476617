"""`coral-hf train`: its settings, data, seeds and stages, end to end on tiny models."""

import json

import pytest
import torch

from coral_hf.cli import main
from coral_hf.drafter.weight_files import file_sha256
from coral_hf.training import recipe


@pytest.mark.slow
def test_settings_and_evaluation_data_of_a_new_drafter(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"id": str(i), "prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + i]} for i in range(3)]
    for name in ("few.jsonl", "dev.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", "--target", "target", "--dtype", "float32", "--data", "few.jsonl", "--output_dir", "out"]
    assert main([*arguments, "--eval_rows", "3"]) == 2  # asked for explicitly, unlike the default
    assert "there are 3 rows" in capsys.readouterr().err
    assert main([*arguments, "--max_steps", "1", "--report_to", "none"]) == 0
    assert "Holding out 0 of 3 rows (0 conversations) for evaluation" in capsys.readouterr().out
    arguments += ["--eval_data", "dev.jsonl", "--max_steps", "1", "--report_to", "none", "--shape", "eagle3"]
    for wrong, message in (
        ('{"widht": 3}', "Unknown setting(s) ['widht']"),
        ("[3]", "JSON object"),
        ("{", "is not JSON"),
    ):
        assert main([*arguments, "--config_overrides", wrong, "--overwrite", "true"]) == 2
        assert message in capsys.readouterr().err
    settings = {"target_feature_layers": [1, -1], "intermediate_size": 48}
    assert main([*arguments, "--config_overrides", json.dumps(settings)]) == 2
    assert "out contains checkpoint-1 of another run, which this run would replace" in capsys.readouterr().err
    assert main([*arguments, "--config_overrides", json.dumps(settings), "--overwrite", "true"]) == 0
    saved = json.loads((folder / "out" / "config.json").read_text())
    assert saved["shape"] == "eagle3" and {name: saved[name] for name in settings} == settings
    assert (
        main(
            [
                *arguments[:-4],
                "--max_steps",
                "1",
                "--drafter",
                "out",
                "--config_overrides",
                "{}",
                "--overwrite",
                "true",
            ]
        )
        == 2
    )
    assert "has its own" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_is_the_best_recipe_known(folder, capsys, monkeypatch):
    """The shape, features, shortlist and tuned draft size of README's table; a preset changes the method alone."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(recipe, "SHORTLIST_UNIT", 8)  # of 128 ids, not of 49,152
    rows = [{"id": str(i), "prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + i, 3]} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--target", "target", "--dtype", "float32", "--data", "rows.jsonl", "--report_to", "none"]
    common += ["--max_steps", "1", "--save_strategy", "no"]
    assert main([*common, "--output", "best"]) == 0
    told = capsys.readouterr().out
    assert "Settings for a new drafter, a target of width 32" in told and "learning_rate 0.001" in told
    assert "Draft size saved in best/config.json" in told
    saved = json.loads((folder / "best" / "config.json").read_text())
    assert saved["shape"] == "eagle3" and saved["target_feature_layers"] == [1, 2, 3] and saved["shortlist_size"] == 16
    tuned = json.loads((folder / "best" / "training" / "tune.json").read_text())
    assert saved["draft_calibration"] == tuned["calibration"] and tuned["n_prompts"] == 2
    record = json.loads((folder / "best" / "training" / "training.json").read_text())
    assert record["chosen"]["learning_rate"] == 0.001 and record["arguments"]["preset"] == "recipe"
    assert "`learning_rate=0.001`" in (folder / "best" / "README.md").read_text()
    eagle = [*common, "--preset", "eagle", "--shape", "eagle", "--shortlist_size", "0", "--learning_rate", "1e-4"]
    assert main([*eagle, "--eval_rows", "0", "--output", "papers"]) == 0
    assert "was not tuned (nothing was held out): coral-hf tune --drafter papers" in capsys.readouterr().out
    saved = json.loads((folder / "papers" / "config.json").read_text())
    assert saved["shape"] == "eagle" and saved["shortlist_size"] == 0 and saved["draft_calibration"] is None
    record = json.loads((folder / "papers" / "training" / "training.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-4 and "rollout_schedule" not in record["chosen"]


@pytest.mark.slow
def test_the_seed_decides_new_weights(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"id": str(i), "prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + i]} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--target", "target", "--dtype", "float32", "--data", "rows.jsonl", "--eval_rows", "0"]
    common += ["--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    router = ["--stage", "router", "--drafter", "first", "--router_groups", "8", "--preset", "hass"]
    for stage, names in (([], ("first", "second", "other")), (router, ("routed", "routed2", "routed3"))):
        for name, seed in zip(names, ("7", "7", "8"), strict=True):
            torch.rand(3)  # whatever was drawn before
            assert main([*common, *stage, "--output_dir", name, "--seed", seed]) == 0
        hashes = [file_sha256(folder / name / "model.safetensors") for name in names]
        assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.slow
def test_streamed_packed_and_compared_with_evaluation_prompts(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"turns": [f"w{i} w{i + 1} w{i + 2}"], "responses": ["ok so be it"], "system": "be"} for i in range(5, 12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", "--target", "target", "--dtype", "float32", "--data", "rows.jsonl", "--output_dir", "out"]
    arguments += [
        "--report_to",
        "none",
        "--tune",
        "false",
        "--eval_rows",
        "2",
        "--check_overlap",
        "prompts.jsonl",
        "--max_length",
        "64",
    ]
    assert main([*arguments, "--streaming", "true"]) == 2
    assert "set max_steps" in capsys.readouterr().err
    arguments += ["--max_steps", "2", "--packing", "true"]
    for wrong in (["--estimate", "true"], ["--shortlist_size", "8"]):
        assert main([*arguments, "--streaming", "true", *wrong]) == 2
        assert f"{wrong[0]}" in capsys.readouterr().err
    for streaming, conversations in (("true", None), ("false", 5)):
        assert main([*arguments, "--streaming", streaming, "--overwrite", "true"]) == 0
        output = capsys.readouterr().out
        assert "warning: 2 of 5 training conversations contain a prompt of prompts.jsonl (2 exactly" in output
        record = json.loads((folder / "out" / "training" / "training.json").read_text())
        assert record["conversations"] == conversations and record["arguments"]["packing"] is True


@pytest.mark.slow
def test_a_training_that_goes_on_keeps_the_records_of_its_stages(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"turns": [f"w{i} w{i + 1}"], "responses": ["ok so be it"]} for i in range(6)]
    for name in ("first.jsonl", "second.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--target", "target", "--dtype", "float32", "--report_to", "none", "--eval_rows", "0"]
    first = ["--data", "first.jsonl", "--output_dir", "one", "--max_steps", "1"]
    assert main([*common, *first]) == 0
    # in its own folder, and then in another, with a file named by a whole path
    second = ["--data", "second.jsonl", "--max_steps", "2", "--drafter", "one", "--output_dir", "one"]
    assert main([*common, *second, "--overwrite_output_dir", "true"]) == 0
    last = ["--data", str(folder / "first.jsonl"), "second.jsonl", "--max_steps", "3", "--drafter", "one"]
    assert main([*common, *last, "--output_dir", "two"]) == 0
    names = ("training-1.json", "training-2.json", "training.json")
    stages = [json.loads((folder / "two" / "training" / name).read_text()) for name in names]
    assert [stage["steps"] for stage in stages] == [1, 2, 3] and {stage["target"] for stage in stages} == {"target"}
    data = [["first.jsonl"], ["second.jsonl"], ["first.jsonl", "second.jsonl"]]
    assert [stage["data"] for stage in stages] == data
    card = (folder / "two" / "README.md").read_text()
    places = [card.index(f"Stage `drafter` for `target`: {steps} steps") for steps in (1, 2, 3)]
    assert places == sorted(places) and str(folder) not in card
    replaced = ["--output_dir", "two", "--max_steps", "1", "--overwrite_output_dir", "true"]
    assert main([*common, *first[:2], *replaced]) == 0  # a new one, of one stage
    assert [path.name for path in (folder / "two" / "training").glob("training*.json")] == ["training.json"]


def test_a_low_rank_head_is_added_and_trained(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"id": str(i), "prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + i]} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--target", "target", "--dtype", "float32", "--data", "rows.jsonl", "--eval-rows", "0"]
    common += ["--max-steps", "1", "--report-to", "none", "--save-strategy", "no", "--output", "out"]
    stage = ["--stage", "low_rank", "--drafter", "drafter"]
    for words, message in (
        (["--low-rank-size", "6", "--drafter", "drafter"], "--low_rank_size 6 adds a low-rank head: train it with"),
        ([*stage, "--low-rank-candidates", "9"], "--low_rank_candidates 9 requires --low_rank_size"),
        (["--stage", "low_rank", "--low-rank-size", "6"], "a trained drafter: name it with --drafter"),
        (stage, "this one has none: call drafter.add_low_rank_head(target, rank) (--low-rank-size) first"),
    ):
        assert main([*common, *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*common, *stage, "--low-rank-size", "6", "--low-rank-candidates", "9"]) == 0
    saved = json.loads((folder / "out" / "config.json").read_text())
    assert (saved["low_rank_size"], saved["low_rank_candidates"]) == (6, 9)
    assert json.loads((folder / "out" / "training" / "training.json").read_text())["stage"] == "low_rank"
