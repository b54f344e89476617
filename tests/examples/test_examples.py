"""The examples for published drafters, run unchanged with tiny models in place of the real ones."""

import io
import json
import sys
from contextlib import suppress

import pytest
import torch
from helpers.hub_server import TOKEN
from helpers.scripts import BENCHMARKS, EXAMPLES, refused, run
from helpers.tiny_models import COMMON, make_drafter, make_target, make_tokenizer
from helpers.tiny_trainings import random_rows
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import CoralDraftModel, demo
from coral_hf.cli import main
from coral_hf.drafter.weight_files import file_sha256
from coral_hf.generation.costs import measurement


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """`demo` with a tiny target and drafter; returns the drafter's folder."""
    target, tokenizer = make_target(dtype=torch.float32), make_tokenizer()
    folder = tmp_path / "tiny"
    make_drafter(target).save_pretrained(folder)
    monkeypatch.setattr(demo, "load_target", lambda *args, **kwargs: (target, tokenizer))
    monkeypatch.setattr(demo, "drafter_path", lambda: folder)
    return folder


def test_demo_command(tiny_demo, tmp_path, capsys):
    path = tmp_path / "demo.json"
    assert main(["demo", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["identical"] and "speedup" in capsys.readouterr().out


def test_chat(tiny_demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand now?\n\n"))
    run(monkeypatch, "chat.py", "--max_new_tokens", "12")
    output = capsys.readouterr().out
    assert output.count("tokens/s, tau") == 2


def test_finetune_for_my_model(tiny_demo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    data, output = tmp_path / "responses.jsonl", tmp_path / "adapted"
    data.write_text("".join(json.dumps({"turn": 0, **row}) + "\n" for row in random_rows(16)))
    arguments = ["--data", str(data), "--output_dir", str(output), "--eval_rows", "4", "--max_steps", "4"]
    arguments += ["--report_to", "none", "--learning_rate", "1e-2", "--disable_tqdm", "true", "--bf16", "false"]
    run(monkeypatch, "finetune_for_my_model.py", *arguments)
    assert "acceptance length" in capsys.readouterr().out
    before, after = CoralDraftModel.from_pretrained(tiny_demo), CoralDraftModel.from_pretrained(output)
    assert set(before.state_dict()) == set(after.state_dict())
    moved = {key for key, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[key])}
    assert "layers.0.self_attn.q_proj.weight" in moved and "norm.weight" not in moved
    assert "not measured" in (output / "README.md").read_text()


def test_estimate_training(tmp_path, monkeypatch, capsys):
    config, record = EXAMPLES / "recipes" / "llama-3-8b-instruct.config.json", tmp_path / "record.json"
    arguments = ["--target", str(config), "--tokens", "1000000", "--flops_per_second", "3e14", "--json", str(record)]
    run(monkeypatch, "estimate_training.py", *arguments)
    assert "peak memory (estimate)" in capsys.readouterr().out
    assert json.loads(record.read_text())["target_parameters"] == 8_030_261_248


def test_benchmark_training(tiny_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sizes = ["--batch", "2", "--length", "80", "--threads", "1", "--json", str(tmp_path / "record.json")]
    run(monkeypatch, "benchmark_training.py", *sizes, "--repeats", "1", "--memory_length", "0")
    record = json.loads((tmp_path / "record.json").read_text())
    for name in ("ratio", "ratio_cached", "ratio_same_precision", "ratio_cached_same_precision"):
        assert record[f"tokens_per_second_{name}"] > 0
    assert record["target_forward_share"] > 0 and set(record["seconds"]) >= {"trainer", "trainer_cached"}
    capsys.readouterr()
    for side in ("trainer", "float32"):
        shape = ["--vocab_size", "128", "--hidden_size", "64", "--memory_length", "80", "--only_memory_of", side]
        run(monkeypatch, "benchmark_training.py", *sizes, *shape)
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["peak"] >= found["above_start"] >= 0


@pytest.mark.slow
def test_ablate_training(tiny_demo, tmp_path, monkeypatch, capsys):
    data, output = tmp_path / "responses.jsonl", tmp_path / "ablation"
    data.write_text("".join(json.dumps({"turn": 0, **row}) + "\n" for row in random_rows(16)))
    common = ["--data", str(data), "--eval_data", str(data), "--output_dir", str(output), "--disable_tqdm", "true"]
    common += ["--response_tokens", "40", "--min_response_tokens", "1", "--report_to", "none", "--save_strategy", "no"]
    strong = "strong:preset=coral,rollout_schedule=2,csra_weight=0.5,config.target_feature_layers=[0,-1]"
    variants = ["--variants", "hass", strong]
    run(monkeypatch, "ablate_training.py", *common, "--seeds", "0", *variants)
    run(monkeypatch, "ablate_training.py", *common, "--seeds", "0", "1", *variants)  # continues
    record = json.loads((output / "ablation.json").read_text())
    assert [(one["variant"], one["seed"]) for one in record["runs"]] == [
        (n, s) for s in (0, 1) for n in ("hass", "strong")
    ]
    assert len({one["steps"] for one in record["runs"]}) == 1 and record["response_tokens"] >= 40
    assert record["acceptance_length"]["strong"]["stdev"] is not None
    assert record["runs"][1]["changes"]["config"] == {"target_feature_layers": [0, -1]}
    assert CoralDraftModel.from_pretrained(output / "strong-0").config.target_feature_layers == [0, -1]
    with refused(capsys, "csra_wait"):
        run(monkeypatch, "ablate_training.py", *common, "--variants", "odd:preset=coral,csra_wait=1")
    stands = (output / "ablation.json").read_text()
    with pytest.raises(SystemExit, match=r"contains runs with training_arguments .*, but this run has .*0\.05"):
        run(
            monkeypatch,
            "ablate_training.py",
            *common,
            "--seeds",
            "0",
            "1",
            *variants,
            "--learning_rate",
            "5e-2",
        )
    with pytest.raises(SystemExit, match=r"contains runs of that name with .*give it another name"):
        run(
            monkeypatch,
            "ablate_training.py",
            *common,
            "--variants",
            "hass:preset=hass,topk_loss_weight=1",
        )
    assert (output / "ablation.json").read_text() == stands


def test_compare_runs(tmp_path, monkeypatch, capsys):
    for name, speedup in (("first", 1.5), ("second", 1.6)):
        row = {"method": "coral", "benchmark": "all", "temperature": 0.0, "speedup": speedup}
        record = {"environment": {}, "runs": [row | {"method": "plain"}, row]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "benchmark.json").write_text(json.dumps(record))
    folders = [str(tmp_path / name) for name in ("first", "second")]
    run(monkeypatch, "compare_runs.py", "--runs", *folders, "--json", str(tmp_path / "record.json"))
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert row["speedups"] == [1.5, 1.6] and row["difference"] == pytest.approx(0.0625)
    with refused(capsys, "two folders"):
        run(monkeypatch, "compare_runs.py", "--runs", folders[0])
    (tmp_path / "second" / "benchmark.json").write_text(json.dumps(record | {"drafter_sha256": "ab12"}))
    with pytest.raises(SystemExit, match=r"another drafter_sha256 \(None, ab12\)"):
        run(monkeypatch, "compare_runs.py", "--runs", *folders)


def test_benchmark_head(tmp_path, monkeypatch, capsys):
    record = tmp_path / "record.json"
    arguments = [
        "--groups",
        "64",
        "--grouping",
        "clustered",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
        str(record),
    ]
    run(monkeypatch, "benchmark_head.py", *arguments)
    found = json.loads(record.read_text())
    assert all(found[name] > 0 for name in ("rows_1", "rows_10", "byte_efficiency")) and found["active"] == 1 / 16


def test_push_to_hub(tiny_demo, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run(monkeypatch, "push_to_hub.py", "--repo_id", "org/tiny", "--license", "mit")
    assert "org/tiny" in capsys.readouterr().out
    assert "license: mit" in hub.files("org/tiny")["README.md"].decode()


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "abc.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "turns": [f"w{i} and {i}"]}) + "\n" for i in range(2)))
    return path


def test_generate(tiny_demo, monkeypatch, capsys):
    run(monkeypatch, "generate.py", "hello")
    assert "acceptance length" in capsys.readouterr().out


def test_benchmark_regeneration(tiny_demo, prompt_file, tmp_path, monkeypatch, capsys):
    sizes = ["--rounds", "2", "--round_prompts", "1", "--batch_size", "2", "--slots", "2", "--max_new_tokens", "6"]
    arguments = ["--prompts", str(prompt_file), *sizes, "--threads", "1", "--json", str(tmp_path / "record.json")]
    run(monkeypatch, "benchmark_regeneration.py", *arguments)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["identical"] == 1 and record["tokens_per_second_ratio"] > 0
    with refused(capsys, "contains 2 prompts"):
        run(
            monkeypatch,
            "benchmark_regeneration.py",
            "--prompts",
            str(prompt_file),
            "--round_prompts",
            "3",
        )


def test_compare_heads(tiny_demo, tmp_path, monkeypatch, capsys):
    data, record = tmp_path / "responses.jsonl", tmp_path / "record.json"
    data.write_text("".join(json.dumps({"turn": 0, **row}) + "\n" for row in random_rows(4)))
    common = ["--responses", str(data), "--counts", str(data), "--threads", "1", "--json", str(record)]
    with refused(capsys, "has no router"):
        run(monkeypatch, "compare_heads.py", "--drafter", str(tiny_demo), *common)
    drafter = CoralDraftModel.from_pretrained(tiny_demo)
    drafter.add_router(16)
    drafter.save_pretrained(tmp_path / "routed")
    with refused(capsys, "--dtype 'number' is unknown"):
        run(
            monkeypatch,
            "compare_heads.py",
            "--drafter",
            str(tmp_path / "routed"),
            *common,
            "--dtype",
            "number",
        )
    run(monkeypatch, "compare_heads.py", "--drafter", str(tmp_path / "routed"), *common)
    curve = json.loads(record.read_text())["curve"]
    assert {row["head"] for row in curve} == {"router", "list", "both"} and len(curve) == 15
    assert all(0 <= row["uncovered"] <= 1 and 0 <= row["recall"] <= 1 for row in curve)


def test_refit_features(tiny_demo, tmp_path, monkeypatch, capsys):
    """If the old layers are among the new ones, the drafter stays the old one, with calibration and settings."""
    target = demo.load_target()[0]
    old = make_drafter(target, shape="eagle3", target_feature_layers=[1, -1], draft_depth=4).bfloat16()
    old.save_pretrained(tmp_path / "old")
    data, output = tmp_path / "responses.jsonl", tmp_path / "new"
    data.write_text("".join(json.dumps(row) + "\n" for row in random_rows(64)))
    common = ["--data", str(data), "--drafter", str(tmp_path / "old"), "--threads", "1", "--rows", "60"]
    run(monkeypatch, "refit_features.py", *common, "--output", str(output), "--layers", "-1", "0", "1")
    assert "reads layers [-1, 0, 1]" in capsys.readouterr().out
    new = CoralDraftModel.from_pretrained(output, dtype="auto")
    assert (
        new.dtype == torch.bfloat16 and new.config.draft_depth == 4 and new.config.target_feature_layers == [-1, 0, 1]
    )
    last, _, first = new.fc.weight.float().split(old.config.hidden_size, dim=1)
    torch.testing.assert_close(torch.cat([first, last], dim=1), old.fc.weight.float(), rtol=0.05, atol=0.02)
    assert all(
        torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items() if "fc" not in name
    )
    for arguments, message in (
        (["--output", str(output), "--layers", "0", "1"], "exists; name another folder"),
        (["--output", str(tmp_path / "x"), "--layers", "1"], "name at least two layers"),
        (["--output", str(tmp_path / "x"), "--layers", "1", "99"], "99"),
        (["--output", str(tmp_path / "x"), "--layers", "0", "1", "--rows", "7"], "give at least 8"),
        (
            ["--output", str(tmp_path / "x"), "--layers", "0", "1", "--drafter", str(tiny_demo)],
            "only an eagle3 drafter",
        ),
    ):
        with refused(capsys, message):
            run(monkeypatch, "refit_features.py", *common, *arguments)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_large_vocabulary(prompt_file, tmp_path, monkeypatch, capsys):
    """With a target in the place of the fetched one: every stage runs, and nothing is repeated."""
    folder = tmp_path / "gemma"
    config = LlamaConfig(**{**COMMON, "vocab_size": 20_000})  # more than the script's shortlist
    LlamaForCausalLM(config).save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    sizes = ["--response_tokens", "6", "--steps", "1", "--router_steps", "1", "--router_groups", "16", "--limit", "1"]
    sizes += ["--dtype", "float32"]
    arguments = ["--data", str(prompt_file), "--eval", str(prompt_file), "--output", str(folder), *sizes]
    for _ in range(2):
        run(monkeypatch, "large_vocabulary.py", *arguments)
        shown = capsys.readouterr().out
        assert all(head in shown for head in ("shortlist", "router", "both"))
        monkeypatch.setattr("coral_hf.training.trainer.CoralTrainer.train", None)
    assert all(row["identical"] == 1 for row in json.loads((folder / "benchmark.json").read_text())["runs"])


@pytest.mark.slow
def test_compare_tree_sizes_and_check_the_prediction(tiny_demo, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "cache"))
    for name in ("_MIN_ROUNDS", "_MAX_ROUNDS"):
        monkeypatch.setattr(measurement, name, 1)
    common = ["--data", str(prompt_file), "--dtype", "float32", "--device", "cpu"]
    sizes = ["--draft-depth", "3", "--draft-top-k", "3", "--draft-total-tokens", "8", "--max-new-tokens", "8"]
    tune = ["tune", *common, "--drafter", str(tiny_demo), *sizes, "--output", str(tmp_path / "tune")]
    assert main(tune) == 0
    record, output = tmp_path / "tune" / "tune.json", tmp_path / "sizes"
    arguments = [*common, "--limit", "1", "--max_new_tokens", "4", "--tune", str(record), "--output", str(output)]
    run(monkeypatch, "compare_tree_sizes.py", *arguments)
    rows = json.loads((output / "sizes.json").read_text())["rows"]
    assert {row["benchmark"] for row in rows} == {"abc", "mean"} and all(row["over_eagle2"] > 0 for row in rows)
    benchmark = json.loads((output / "benchmark.json").read_text())
    assert all(row["identical"] == 1 for row in benchmark["runs"]) and len(benchmark["methods"]) == 16
    checked = tmp_path / "checked.json"
    arguments = ["--tune", str(record), "--benchmark", str(output / "benchmark.json"), "--json", str(checked)]
    with suppress(SystemExit):  # status 1: a tiny model's times are all overhead
        run(monkeypatch, "predict_speedup.py", *arguments)
    found = json.loads(checked.read_text())
    assert "tuned" in {row["method"] for row in found["rows"]}
    sha256 = file_sha256(tiny_demo / "model.safetensors")
    assert found["tune"] == {"target": "", "drafter_sha256": sha256}
    assert set(found["benchmark"]["drafter_sha256"].values()) == {sha256}


def test_predict_speedup_from_numbers(monkeypatch, capsys):
    times = ["--plain_ms", "10", "--verify_ms", "15", "--draft_ms", "5"]
    run(monkeypatch, "predict_speedup.py", *times, "--acceptance", "0.5", "0.5", "--source", "a paper")
    assert "predicted, not measured (a paper): tau 1.75, speedup 0.88x" in capsys.readouterr().out
    with refused(capsys, "Give --tune and --benchmark"):
        run(monkeypatch, "predict_speedup.py", *times)


def test_predict_from_bandwidth(tmp_path, monkeypatch, capsys):
    """The committed record is that of the command, and describes every row."""
    path = tmp_path / "record.json"
    run(monkeypatch, "predict_from_bandwidth.py", "--json", str(path))
    assert all(line.startswith("predicted, not measured") for line in capsys.readouterr().out.splitlines())
    record = json.loads(path.read_text())
    assert record == json.loads((BENCHMARKS / "records" / "predictions_7b.json").read_text())
    rows = {(row["gpu"], row["target"], row["head"]): row for row in record["rows"]}
    assert len(rows) == 12 and {row["figures"] for row in record["rows"]} == {"predicted, not measured"}
    # Llama-2-7B by hand: 6.74 G weights without the embedding's 0.13 G, two bytes each, at 614.4 GB/s
    row = rows["A6000", "Llama-2-7B-chat", "full"]
    assert row["predicted_target_ms"] == pytest.approx(2 * (6.738e9 - 0.131e9) / 614.4e6, rel=1e-3)
    step = row["predicted_target_ms"] + row["predicted_draft_ms"]
    assert row["predicted_speedup"] == pytest.approx(row["predicted_target_ms"] * 3.951 / step, abs=0.01)
    run(monkeypatch, "predict_from_bandwidth.py", "--gpu", "A6000")
    assert all(", A6000, " in line for line in capsys.readouterr().out.splitlines())
    run(monkeypatch, "predict_from_bandwidth.py", "--gpu", "A100 80GB", "--bandwidth_gb_s", "2039")
    assert all(", A100 80GB, " in line for line in capsys.readouterr().out.splitlines())
    with refused(capsys, "--gpu A100 80GB is none of A6000, H100 SXM: give its --bandwidth_gb_s too"):
        run(monkeypatch, "predict_from_bandwidth.py", "--gpu", "A100 80GB")
    with refused(capsys, "shares above 0"):
        run(monkeypatch, "predict_from_bandwidth.py", "--achievable", "0")


@pytest.mark.exhaustive
def test_reproduce_tables(tiny_demo, prompt_file, tmp_path, monkeypatch, capsys):
    data, output = tmp_path / "responses.jsonl", tmp_path / "tables"
    data.write_text("".join(json.dumps({"turn": 0, **row}) + "\n" for row in random_rows(80)))
    arguments = ["--data", str(prompt_file), "--responses", str(data), "--output", str(output), "--dtype", "float32"]
    arguments += ["--max_steps", "1", "--router_groups", "8", "--shortlist_size", "16", "--max_new_tokens", "4"]
    run(monkeypatch, "reproduce_tables.py", *arguments, "--limit", "1")
    printed = capsys.readouterr().out
    with refused(capsys, "--dtype 'number' is unknown"):
        run(monkeypatch, "reproduce_tables.py", *arguments, "--dtype", "number")
    assert "temperature 1" in printed and "coral+router" in printed and "the paper's own" in printed
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"eagle", "hass", "coral", "coral+router"}
