"""Settings left out: the choice for a target, what overrides it, and that every page says the same."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.published_targets import TARGETS
from helpers.tiny_models import make_target
from helpers.tiny_trainings import make_args, make_trainer, quick_drafter, random_rows

from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.recipe import LEARNING_RATES, choose_recipe, drafter_settings, shortlist_size
from coral_hf.training.report.estimate import estimate_on_paper
from coral_hf.training.trainer import CoralTrainer


ROOT = Path(__file__).parents[2]


def test_the_rate_follows_width_and_batch():
    (narrow, few, many, _), (wide, wide_few, wide_many, _) = LEARNING_RATES

    def rate(width, tokens, **kwargs):
        return choose_recipe(width, response_tokens=tokens, device_type="cuda", **kwargs).learning_rate

    assert rate(narrow, 200_000) == few and rate(narrow, 22_000_000) == many
    assert rate(wide, 200_000) == wide_few and rate(wide, 10**9) == wide_many
    widths = [rate(width, 22_000_000) for width in (256, 576, 1024, 2048, 4096, 8192)]
    assert widths == sorted(widths, reverse=True) and widths[0] == many and widths[-1] == wide_many
    assert rate(narrow, 200_000, continued=True) == few / 4
    assert rate(narrow, 200_000, stage="router") == 1e-3 > rate(wide, 200_000, stage="router") == 1.4e-4


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize(("width", "device"), [(576, "cpu"), (576, "cuda"), (2048, "cuda"), (4096, "cuda")])
def test_a_step_takes_as_many_conversations_however_they_are_spread(width, device, processes):
    for tokens, expected in ((200_000, 8), (2_000_000, 16), (22_000_000, 16 if device == "cpu" else 64)):
        recipe = choose_recipe(width, response_tokens=tokens, device_type=device, num_processes=processes)
        micro, steps = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
        assert micro * steps * processes == expected

    packed = choose_recipe(width, response_tokens=22_000_000, device_type=device, rows_per_conversation=0.25)
    whole = choose_recipe(width, response_tokens=22_000_000, device_type=device)
    assert packed.per_device_train_batch_size == max(1, round(whole.per_device_train_batch_size / 4))


def test_more_data_is_read_less_often():
    epochs = {
        width: [
            choose_recipe(width, response_tokens=tokens).num_train_epochs for tokens in (10**5, 10**7, 10**8, None)
        ]
        for width in (576, 4096)
    }
    assert epochs == {576: [3.0, 2.0, 1.0, 1.0], 4096: [10.0, 10.0, 3.0, 2.0]}


def test_a_new_drafter_is_shaped_as_the_shipped_one():
    shipped = json.loads((ROOT / "model_cards/smollm2-135m-instruct-coral/config.json").read_text())
    config = TARGETS["llama-3-8b-instruct"]
    assert drafter_settings(config) == {"shape": "eagle3", "target_feature_layers": [3, 16, 28, 31]}
    config.num_hidden_layers, before = shipped["target_num_hidden_layers"], config.num_hidden_layers
    try:
        found = drafter_settings(config)
        assert found == {name: shipped[name] for name in found}
        config.num_hidden_layers = 2
        assert drafter_settings(config) == {"shape": "eagle3"}
    finally:
        config.num_hidden_layers = before
    assert shortlist_size(shipped["vocab_size"]) == shipped["shortlist_size"] and shortlist_size(5000) == 0


def test_what_is_given_stays(tmp_path, capsys):
    target = make_target(dtype=torch.float32)
    given = {"learning_rate": 1e-2, "warmup_steps": 0, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    where = {"use_cpu": True, "report_to": "none", "bf16": False, "save_strategy": "no"}
    args = CoralTrainingArguments(str(tmp_path), **where, **given)
    assert args.gradient_accumulation_steps == 1  # of a batch that was given
    args.weight_decay = 0.3  # set since
    rows = random_rows(24)
    trainer = CoralTrainer(quick_drafter(target), target, args, train_dataset=rows)
    assert {name: getattr(args, name) for name in given} == given and args.weight_decay == 0.3
    assert trainer.chosen == {
        "feature_noise": 0.1,
        "rollout_schedule": "1:0.5,3:0.5",
        "csra_weight": 0.05,
        "loss_chunk_size": 256,
    }
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Settings for a new drafter")]
    assert len(told) == 1 and "width 32" in told[0] and "feature_noise 0.1" in told[0] and "learning" not in told[0]
    assert args.rollout == [(1, 0.5), (3, 0.5)] and not set(trainer.chosen) & set(args.non_defaults())


def test_a_trained_drafter_goes_on_at_a_lower_rate(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = quick_drafter(target)
    open_settings = {"learning_rate": None, "rollout_schedule": None, "preset": "recipe"}
    first = make_trainer(tmp_path, target, drafter, **open_settings)
    drafter.save_pretrained(tmp_path / "drafter")
    further = make_trainer(tmp_path, target, type(drafter).from_pretrained(tmp_path / "drafter"), **open_settings)
    assert further.args.learning_rate == first.args.learning_rate / 4
    assert (first.args.rollout_schedule, further.args.rollout_schedule) == ("1:0.5,3:0.5", "3")


def test_few_steps_have_no_warm_up(tmp_path):
    args = make_args(tmp_path, warmup_steps=0.03)
    assert [args.get_warmup_steps(steps) for steps in (1, 30, 100)] == [0, 0, 3]
    assert make_args(tmp_path, warmup_steps=30).get_warmup_steps(100) == 30


def test_an_estimate_asks_for_the_same_settings():
    config = TARGETS["llama-3-8b-instruct"]
    recipe = choose_recipe(config.hidden_size, config.vocab_size, response_tokens=48_000_000, device_type="cuda")
    named = {"batch_size": recipe.per_device_train_batch_size, "num_steps": recipe.deepest}
    settings = {"length": 256, "tokens": 48_000_000, "flops_per_second": 3e14}
    assert estimate_on_paper(config, **settings) == estimate_on_paper(
        config, **named, epochs=recipe.num_train_epochs, **settings
    )


def test_pages_are_those_of_the_record_and_the_recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "build_recipe", raising=False)
    import build_recipe

    assert (ROOT / build_recipe.PAGE).read_text() == build_recipe.page(), "run python docs/build_recipe.py"
    text = (ROOT / build_recipe.SETTINGS).read_text()
    assert text == build_recipe.with_settings(text), "run python docs/build_recipe.py"
    record = build_recipe.read(build_recipe.RECORD)
    config = TARGETS["llama-3-8b-instruct"]
    tokens = record["settings"]["tokens"]
    recipe = choose_recipe(config.hidden_size, config.vocab_size, response_tokens=tokens, device_type="cuda")
    assert record["recipe"] == recipe.to_dict() and record["drafter"] == drafter_settings(config)
    script = (ROOT / "examples/recipes/paper_target.sh").read_text()
    assert not [name for name in recipe.to_dict() if f"--{name.replace('_', '-')}" in script]
