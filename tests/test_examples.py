"""The examples around published drafters, run as they stand with tiny models in the place of the embedded ones."""

import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_drafter, make_target, make_tokenizer
from hub_server import TOKEN
from test_hub import hub  # noqa: F401  (a fixture)
from test_trainer import random_rows

from coral_hf import CoralDraftModel, demo


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """`demo` with a tiny target and drafter; returns the drafter's folder."""
    target, tokenizer = make_target(dtype=torch.float32), make_tokenizer()
    folder = tmp_path / "tiny"
    make_drafter(target).save_pretrained(folder)
    monkeypatch.setattr(demo, "load_target", lambda *args, **kwargs: (target, tokenizer))
    monkeypatch.setattr(demo, "drafter_path", lambda: folder)
    return folder


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


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
    monkeypatch.syspath_prepend(EXAMPLES)
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


def test_push_to_hub(tiny_demo, hub, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run(monkeypatch, "push_to_hub.py", "--repo_id", "org/tiny", "--license", "mit")
    assert "org/tiny" in capsys.readouterr().out
    assert "license: mit" in hub.files("org/tiny")["README.md"].decode()
