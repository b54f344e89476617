"""The cost of a training: measured without side effects, and calculated, against figures by hand or by training."""

import json

import pytest
import torch
from helpers.published_targets import EAGLE_PARAMETERS, TARGETS
from helpers.tiny_models import make_target, make_tokenizer
from helpers.tiny_trainings import make_trainer, quick_drafter, random_rows

from coral_hf import CoralDraftConfig, CoralDraftModel, cli, demo
from coral_hf.training.recipe import drafter_settings
from coral_hf.training.report import estimate
from coral_hf.training.report.estimate import estimate_on_paper, measure_training, rollout_bytes


def test_train_estimate_prints_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    target = make_target(dtype=torch.float32)
    monkeypatch.setattr(demo, "load_target", lambda *args, **kwargs: (target, make_tokenizer()))
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in random_rows(16)))
    arguments = ["--data", str(data), "--output-dir", str(tmp_path / "out"), "--eval-rows", "0", "--bf16", "false"]
    arguments += [
        "--cache-features",
        str(tmp_path / "cache"),
        "--per-device-train-batch-size",
        "4",
        "--estimate",
        "true",
    ]
    before = {name: value.clone() for name, value in target.state_dict().items()}
    assert cli.main(["train", *arguments]) == 0
    output = capsys.readouterr().out
    drafter = CoralDraftModel.from_target(target, **drafter_settings(target.config))
    assert f"drafter {sum(p.numel() for p in drafter.parameters()):,}" in output
    for text in ("peak memory (measured)", "speed (measured)", "time (estimate)", "disk (estimate)", "(frozen)"):
        assert text in output, text
    # three epochs, the recipe's for little data, over the response tokens
    assert f"for {3 * sum(len(row['response_ids']) for row in random_rows(16)):,} tokens" in output
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_the_longest_rows_are_measured_however_rows_are_sampled(strategy, tmp_path):
    long = [{"prompt_ids": [5] * 4, "response_ids": [6] * count} for count in (400, 300, 200, 100, 90)]
    rows = [*random_rows(40), *long, *random_rows(20, seed=1)]
    trainer = make_trainer(tmp_path, make_target(), rows=rows, max_steps=2, train_sampling_strategy=strategy)
    shapes, collate = [], trainer.data_collator

    def note(items):
        batch = collate(items)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    trainer.data_collator = note
    measured = measure_training(trainer, 1.0)
    assert shapes[:2] == [(4, 404), (4, 94)]
    assert len(trainer.train_dataset) == 65 and measured.tokens == trainer.train_dataset.num_response_tokens


def test_peak_memory_without_linux(tmp_path, monkeypatch):
    """Without /proc, the peak is that of `getrusage`."""
    monkeypatch.setattr(estimate, "Path", lambda name: tmp_path / "absent" / name.lstrip("/"))
    estimate.reset_peak(torch.device("cpu"))
    assert estimate.peak_memory(torch.device("cpu")) > 2**20


@pytest.mark.parametrize("name", list(TARGETS))
def test_on_paper(name):
    config = TARGETS[name]
    draft = CoralDraftConfig.from_target(config, shape="eagle")
    settings = {"batch_size": 1, "length": 256, "tokens": 1_000_000, "epochs": 2, "tokens_per_second": 5000}
    cost = estimate_on_paper(config, draft, **settings)
    assert cost.drafter_parameters == EAGLE_PARAMETERS[name]
    assert 6.5e9 < cost.target_parameters < 8.1e9
    assert cost.memory["target weights"] == 2 * cost.target_parameters
    assert cost.memory["optimizer"] == 8 * cost.drafter_parameters
    assert cost.memory["peak"] == sum(v for key, v in cost.memory.items() if key != "peak")
    assert cost.feature_cache_bytes == 1_000_000 * config.hidden_size * 2
    assert cost.checkpoint_bytes == 12 * cost.drafter_parameters
    assert cost.hours == pytest.approx(2_000_000 / 5000 / 3600)
    lines = "\n".join(cost.lines())
    assert "measured" not in lines and lines.count("estimate") == 4
    faster = estimate_on_paper(config, draft, **{**settings, "tokens_per_second": None, "flops_per_second": 1e15})
    assert 20_000 < faster.tokens_per_second < 100_000  # about 2 x 7e9 + 18 x 0.3e9 + heads per token


@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
def test_activations_are_those_of_a_real_rollout(shape):
    target = make_target(dtype=torch.float32)
    drafter = quick_drafter(target, shape, torch.bfloat16).train()
    size = drafter.config.num_target_features * 32
    embeds, features = torch.randn(2, 48, 32).bfloat16(), torch.randn(2, 48, size).bfloat16()
    weights, kept = {p.untyped_storage().data_ptr() for p in drafter.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        drafter(embeds, features, num_steps=3, document_ids=torch.zeros(2, 48, dtype=torch.long))
    real = sum(size for _, size in kept.values())
    # the meta device counts plain attention, which keeps its weights in step 1
    assert real <= rollout_bytes(drafter, 2, 48, 3, False) <= 1.2 * real
    assert rollout_bytes(drafter, 2, 48, 3, True) < 0.7 * real
