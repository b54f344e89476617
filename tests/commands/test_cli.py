"""The command line: one-line errors with status 2, and every verb end to end on tiny models."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target

from coral_hf.cli import COMMANDS, main
from coral_hf.conversion import export_drafter
from coral_hf.drafter.weight_files import file_sha256


def test_usage(capsys):
    assert main([]) == 2
    assert "regenerate" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert main(["fly"]) == 2
    assert "unknown verb 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--dtype", "int7"], "int7"),
        (["demo", "--device", "nowhere:1"], "--device 'nowhere:1' cannot be used here"),
        (["demo", "--max-new-tokens", "0"], "max-new-tokens 0"),
        (["train", "--data", "missing.jsonl", "--output_dir", "out"], "missing.jsonl"),
        (["train", "--data", "x", "--output_dir", "out", "--preset", "hydra"], "hydra"),
        (["train", "--data", "x", "--output_dir", "out", "--rollout-schedule", "1", "--csra-weight", "0.1"], "K=1"),
        (["train", "--data", "x.jsonl", "--output_dir", "out", "--eval-rows", "-1"], "--eval_rows -1"),
        (["regenerate", "--prompts", "missing.jsonl", "--output", "out.jsonl"], "missing.jsonl"),
        (["benchmark", "--data", "missing.jsonl", "--output", "out"], "missing.jsonl"),
        (["benchmark", "--output", "out", "--method", "fly"], "'fly' is unknown; choose coral"),
        (["benchmark", "--output", "out", "--method", "assistant"], "--assistant MODEL"),
        (
            ["benchmark", "--output", "out", "--method", "prompt_lookup:prompt_lookup_num_tokens=abc"],
            "='abc' must be an",
        ),
        (["verify", "--data", "missing.jsonl"], "missing.jsonl"),
        (["verify", "--data", "."], "is a folder without rows"),
        (["demo", "--json", "nowhere/out.json"], "its folder does not exist"),
        (["demo", "--json", "."], "--json . is a folder; give the path of a file"),
        (["tune", "--data", "x", "--output", __file__], "is a file; give a folder, new or existing"),
        (["tune", "--data", "x", "--output", f"{__file__}/out"], "is a file; give a folder, new or existing"),
        (["verify", "--data", "x", "--output", __file__], "is a file; give a folder"),
        (["regenerate", "--prompts", "x", "--output", "."], "--output . is a folder; give the path of a file"),
        (["regenerate", "--prompts", "x", "--output", f"{__file__}/out.jsonl"], "is a file; give a folder"),
        (["regenerate", "--prompts", "x", "--output", "y", "--shards", __file__], f"--shards {__file__}: "),
        (["train", "--data", "x", "--output_dir", __file__], f"--output_dir {__file__}: "),
        (["convert", "--from", "eagle", "x", __file__, "--target", "y"], "exists already; name a new or an empty"),
        (["convert", "--to", "vllm", "x", __file__], "exists already; name a new or an empty"),
        (["verify", "--data", "x", "--temprature", "1"], "'--temprature'; did you mean --temperature?"),
        (["verify", "--data", "x", "--xyz"], "`coral-hf verify --help` lists the options"),
        (["verify", "--data", "x", "--threads", "0"], "--threads 0 must be at least 1"),
        (["benchmark", "--output", "out", "--drafter", "nothere"], "--drafter nothere is not a folder here"),
        (["benchmark", "--output", "out", "--drafter", __file__], "is a file; give the folder"),
        (["benchmark", "--output", __file__], "is a file; give a folder"),
        (["benchmark", "--output", "out", "--limit", "-1"], "--limit -1 must be at least 1"),
        (
            ["benchmark", "--output", "out", "--limit", "0"],
            "--limit 0 must be at least 1; leave it out for all prompts",
        ),
        (["verify", "--data", "x", "--limit", "0"], "--limit 0 must be at least 1"),
        (["tune", "--data", "x", "--output", "out", "--limit", "0"], "--limit 0 must be at least 1"),
        (["benchmark", "--output", "out", "--drafter", "a", "b", "a"], "--drafter names a more than once"),
        (["convert", "in", "out", "--to", "vllm", "--revision", "v1"], "--revision v1 is for --from: leave it out"),
        (
            ["convert", "in", "out", "--to", "vllm", "--target_feature_layers", "1", "2"],
            "--target_feature_layers 1 2 is",
        ),
        (
            ["convert", "in", "out", "--from", "eagle", "--draft_depth", "3"],
            "--draft_depth 3 is for --to: leave it out",
        ),
        (["convert", "in", "out"], "--to ENGINE; neither is given"),
        (["convert", "in", "out", "--from", "eagle", "--to", "vllm"], "--from eagle and --to vllm are given"),
        (["tune", "--output", "out", "--data", "x", "--max-new-tokens", "1"], "--max-new-tokens 1 must be at least 2"),
        (["tune", "--output", "out", "--data", "x", "--temperature", "nan"], "temperature=nan must be a finite"),
        (["verify", "--data", "x", "--temperature", "nan"], "temperature=nan must be a finite"),
        (["verify", "--data", "x", "--temperature", "1", "-1"], "temperature=-1.0 must be a finite"),
        (["benchmark", "--output", "out", "--temperature", "0", "inf"], "temperature=inf must be a finite"),
        (["benchmark", "--output", "out", "--temperature", "-1"], "temperature=-1.0 must be a finite"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_missing_target_is_named(folder, capsys):
    output = folder / "out.jsonl"
    arguments = ["regenerate", "--prompts", str(folder / "prompts.jsonl"), "--output", str(output), "--target", "gone"]
    assert main(arguments) == 2
    assert "--target gone is not a folder here" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("drafter", "target", "messages"),
    [
        ("target", "target", ["--drafter target is an ordinary model of type 'llama'", "coral-hf train"]),
        ("engine", "target", ["--drafter engine is an EAGLE-family", "coral-hf convert --from eagle engine"]),
        ("eagle1", "target", ["--drafter eagle1 is an EAGLE-family", "(LlamaForCausalLM)"]),
        ("speculator", "target", ["--drafter speculator is an EAGLE-family", "(Eagle3Speculator)"]),
        ("drafter", "drafter", ["--target drafter is a CORAL drafter", "name it with --drafter"]),
        ("target", "drafter", ["is an ordinary model"]),
    ],
)
@pytest.mark.parametrize("verb", ["verify", "benchmark", "tune"])
def test_the_wrong_model_is_told_by_its_config(verb, drafter, target, messages, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    small = make_target(dtype=torch.float32)
    engine = make_drafter(small, shape="eagle3", target_feature_layers=[1, 2])
    export_drafter(engine, "vllm", "engine")
    export_drafter(engine, "speculators", "speculator", target_name="target")
    export_drafter(make_drafter(small, shape="eagle"), "eagle", "eagle1")
    config = json.loads((folder / "eagle1" / "config.json").read_text())
    del config["coral_config"]  # as EAGLE's own code writes it
    (folder / "eagle1" / "config.json").write_text(json.dumps(config))
    arguments = [verb, "--drafter", drafter, "--target", target, "--data", "prompts.jsonl", "--output", "out"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(message in error for message in messages) and len(error) < 400
    assert not (folder / "out").exists()


def test_a_drafter_is_no_assistant(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = [
        "benchmark",
        "--drafter",
        "drafter",
        "--target",
        "target",
        "--data",
        "prompts.jsonl",
        "--output",
        "out",
    ]
    assert main([*arguments, "--assistant", "drafter"]) == 2
    assert "--assistant drafter is a CORAL drafter" in capsys.readouterr().err


def test_malformed_line_is_named(folder, capsys):
    path = folder / "prompts.jsonl"
    path.write_text(path.read_text() + '{"id": "broken"\n')
    output = folder / "out.jsonl"
    target = str(folder / "target")
    assert main(["regenerate", "--target", target, "--prompts", str(path), "--output", str(output)]) == 2
    assert "line 7" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_regenerate_train_benchmark(folder, capsys, monkeypatch):
    """Prompts -> responses -> drafter -> record, each by its verb; the three presets train by the same command."""
    monkeypatch.chdir(folder)
    common = ["--target", "target", "--dtype", "float32"]
    arguments = ["regenerate", *common, "--prompts", "prompts.jsonl", "--output", "responses.jsonl"]
    assert main([*arguments, "--max-new-tokens", "12", "--max-prompt-tokens", "64", "--slots", "4"]) == 0
    assert len((folder / "responses.jsonl").read_text().splitlines()) == 6
    for preset in ("eagle", "hass", "coral"):
        arguments = ["train", *common, "--data", "responses.jsonl", "--output_dir", preset, "--preset", preset]
        arguments += [
            "--max_steps",
            "4",
            "--per_device_train_batch_size",
            "2",
            "--eval_rows",
            "2",
            "--tune",
            str(preset == "coral"),
            "--save_steps",
            "4",
        ]
        assert main([*arguments, "--report_to", "none", "--logging_steps", "1"]) == 0
        assert (folder / preset / "model.safetensors").exists()
        told = capsys.readouterr().out.strip().splitlines()
        metrics = json.loads(told[-3])
        assert told[-2] == f"Wrote {preset}" and told[-1].startswith(
            f"Next: coral-hf verify --target target --drafter {preset}"
        )
        assert metrics["eval_acceptance_length"] >= 1.0
    methods = ["coral", "tree:draft_depth=5,draft_top_k=2,draft_total_tokens=7", "lookup:prompt_lookup_num_tokens=3"]
    arguments = ["benchmark", *common, "--drafter", "coral", "--data", "prompts.jsonl", "--limit", "2"]
    assert (
        main([*arguments, "--max-new-tokens", "10", "--output", "bench", "--profile", "true", "--method", *methods])
        == 0
    )
    record = json.loads((folder / "bench" / "benchmark.json").read_text())
    assert not record["partial"]
    assert record["drafter"] == "coral" and record["draft_settings"]["tree"]["draft_total_tokens"] == 7
    assert record["drafter_sha256"] == file_sha256(folder / "coral" / "model.safetensors")
    shutil.copy(folder / "bench" / "benchmark.json", folder / "coral" / "training")
    assert main(["card", "coral"]) == 0
    card = (folder / "coral" / "README.md").read_text()
    assert (
        "`tree`: tree of 7 nodes" in card
        and "Stage `drafter` for `target`: 4 steps over 4 conversations of `responses.jsonl`," in card
    )
    profile = json.loads((folder / "bench" / "step_time.json").read_text())["methods"]
    assert set(profile) == {"coral", "tree"}
    for row in profile.values():
        parts = row["milliseconds"]
        assert 0 < parts["other_share"] < 1
        named = sum(value for name, value in parts.items() if name not in ("step", "other_share"))
        assert named == pytest.approx(parts["step"])
    rows = {(row["method"], row["benchmark"]): row for row in record["runs"]}
    for method in ("plain", "coral", "tree", "lookup"):
        assert rows[method, "all"]["identical"] == rows[method, "all"]["n_turns"] == 2
    assert rows["lookup", "all"]["acceptance_length"] is None
    assert {"torch", "transformers", "device", "dtype", "threads", "commit"} <= set(record["environment"])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "coral-hf train: interrupted; "),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore"),
            1,
            "out of memory (CUDA out of memory.); try a smaller --per",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
            1,
            "smaller --per_device_train_batch_size",
        ),
        (MemoryError(), 1, "out of memory (MemoryError); try"),
    ],
)
def test_interruptions_and_a_full_memory_are_one_line(error, status, message, capsys, tmp_path, monkeypatch):
    def run(self, args):
        raise error

    monkeypatch.setattr(COMMANDS["train"], "run", run)
    arguments = ["train", "--data", "x", "--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true"]
    assert main(arguments) == status
    found = capsys.readouterr().err.strip()
    assert message in found and "\n" not in found


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    def run(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(COMMANDS["verify"], "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["verify", "--data", "x"])


def test_excluded_rows_need_ids(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "answers.jsonl").write_text('{"id": "a", "prompt_ids": [1], "response_ids": [2]}\n{"text": "none"}\n')
    arguments = ["regenerate", "--target", "target", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    assert main([*arguments, "--exclude", "answers.jsonl"]) == 2
    assert "--exclude answers.jsonl, line 2: the row's id is None; give response files" in capsys.readouterr().err


def test_prompts_as_long_as_the_target_lets_them_be(folder, capsys, monkeypatch):
    """The tiny target has 512 positions, fewer than the usual longest prompt has."""
    monkeypatch.chdir(folder)
    arguments = ["regenerate", "--target", "target", "--dtype", "float32", "--prompts", "prompts.jsonl"]
    arguments += ["--output", "out.jsonl", "--max-new-tokens", "4", "--max-turns", "1", "--slots", "4"]
    for _ in range(2):  # once more: nothing is answered or packed again
        assert main([*arguments, "--shards", "shards"]) == 0
    assert [path.name for path in (folder / "shards").iterdir()] == ["responses-00000.parquet"]
