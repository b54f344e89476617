"""Variables of the chat template: given once or per row, in every verb that renders, and recorded."""

import json

import pytest
from helpers.thinking_templates import thinking_tokenizer

from coral_hf import CoralDraftConfig
from coral_hf.cli import main
from coral_hf.data.chat import template_kwargs_of, with_template_kwargs
from coral_hf.training.run.run_folder import PROGRESS_FILE


OFF = '{"enable_thinking": false}'
TARGET = ["--target", "target", "--dtype", "float32"]
MEASURE = [*TARGET, "--data", "prompts.jsonl", "--limit", "1", "--max_new_tokens", "3"]


@pytest.fixture
def thinking(folder, monkeypatch):
    """A folder whose target has Qwen3's template."""
    monkeypatch.chdir(folder)
    thinking_tokenizer("qwen3").save_pretrained(folder / "target")
    return folder


def train(output, *extra):
    arguments = [
        "train",
        *TARGET,
        "--data",
        "rows.jsonl",
        "--output_dir",
        output,
        "--max_steps",
        "1",
        "--eval_rows",
        "0",
    ]
    return main([*arguments, "--report_to", "none", "--save_steps", "1", *extra])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_mode_of_a_training_is_in_checkpoint_drafter_and_card(thinking, capsys):
    rows = [{"turns": [f"w{i} w{i + 1}"], "responses": ["ok so be it"]} for i in range(6)]
    (thinking / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("off", "--chat-template-kwargs", OFF) == 0
    told = capsys.readouterr().out
    assert "<think>  </think> ⟦ok so be it" in told, "the prompt brings the empty block"
    assert CoralDraftConfig.from_pretrained("off").chat_template_kwargs == {"enable_thinking": False}
    progress = json.loads((thinking / "off" / "checkpoint-1" / PROGRESS_FILE).read_text())
    assert progress["chat_template_kwargs"] == OFF
    card = (thinking / "off" / "README.md").read_text()
    assert f"- Chat template's variables in training: `{OFF}`" in card
    resume = ["--resume_from_checkpoint", "last", "--max_steps", "2", "--ignore_data_skip", "true"]
    assert train("off", *resume) == 2
    assert "with another chat_template_kwargs" in capsys.readouterr().err
    assert train("off", *resume, "--chat-template-kwargs", OFF) == 0
    assert train("on") == 0 and "⟦<think>  </think> ok so be it" in capsys.readouterr().out
    assert CoralDraftConfig.from_pretrained("on").chat_template_kwargs == {}
    # a benchmark in another mode says so, in its output and on the card
    for verb, name in (("benchmark", "benchmark.json"), ("verify", "check_coral.json"), ("tune", "tune.json")):
        small = ["--draft_depth", "2", "--draft_top_k", "1", "--draft_total_tokens", "3"] if verb == "tune" else []
        arguments = [verb, *MEASURE, *small, "--drafter", "off", "--temperature", "0", "--output", "off/training"]
        assert main([*arguments, "--chat-template-kwargs", OFF]) == 0
        assert "trained with" not in capsys.readouterr().err
        assert main(arguments) == 2, "another measurement"
        assert main([*arguments, "--overwrite", "true"]) == 0
        assert (
            f"off was trained with the chat-template variables {OFF}, but this run has {{}}" in capsys.readouterr().err
        )
        assert json.loads((thinking / "off" / "training" / name).read_text())["chat_template_kwargs"] == {}
    assert main(["card", "off"]) == 0
    card = (thinking / "off" / "README.md").read_text()
    assert "- In `training/benchmark.json`, which measured another mode: `{}`" in card


def test_the_tuning_after_a_training_is_in_its_mode(thinking, monkeypatch):
    rows = [{"turns": [f"w{i} w{i + 1}"], "responses": ["ok so be it"]} for i in range(6)]
    (thinking / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def stop(target, tokenizer, *args):
        seen.append(template_kwargs_of(tokenizer))
        raise KeyboardInterrupt

    monkeypatch.setattr("coral_hf.evaluation.tune.tune", stop)
    assert train("off", "--chat-template-kwargs", OFF, "--eval_rows", "2") == 130
    assert seen == [{"enable_thinking": False}]


@pytest.mark.slow
def test_a_rows_own_mode_goes_before_the_runs(thinking, capsys):
    prompts = [
        {"id": "a", "turns": ["one"]},
        {"id": "b", "turns": ["two"], "chat_template_kwargs": {"enable_thinking": True}},
    ]
    (thinking / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    arguments = [
        "regenerate",
        *TARGET,
        "--prompts",
        "prompts.jsonl",
        "--output",
        "rows.jsonl",
        "--max_new_tokens",
        "4",
    ]
    assert main([*arguments, "--slots", "2", "--chat-template-kwargs", OFF, "--shards", "shards"]) == 0
    tokenizer = thinking_tokenizer("qwen3")
    for row in lines(thinking / "rows.jsonl"):
        off = row["id"] == "a"
        assert row["chat_template_kwargs"] == {"enable_thinking": not off}
        assert tokenizer.decode(row["prompt_ids"]).endswith("{s}assistant " + ("<think>  </think> " if off else ""))
    capsys.readouterr()
    assert main([*arguments, "--slots", "2"]) == 2
    assert "'a' is answered on file with chat_template_kwargs {'enable_thinking': False}" in capsys.readouterr().err
    # two modes are none, one is recorded, from ids as well
    assert train("both") == 0 and "The rows use 2 modes" in capsys.readouterr().out
    assert CoralDraftConfig.from_pretrained("both").chat_template_kwargs is None
    for source in ("rows.jsonl", "shards"):
        rows = [row for row in lines(thinking / "rows.jsonl") if row["id"] == "a"]
        (thinking / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
        extra = ["--data", "one.jsonl" if source == "rows.jsonl" else source]
        assert train(f"from_{source}", *extra) == 0
    assert CoralDraftConfig.from_pretrained("from_rows.jsonl").chat_template_kwargs == {"enable_thinking": False}
    assert CoralDraftConfig.from_pretrained("from_shards").chat_template_kwargs is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "--chat_template_kwargs is not JSON"),
        ("[1]", "--chat_template_kwargs must be an object"),
        ('{"enable_thinkng": false}', "sets enable_thinkng, which this target's chat template does not read"),
        ('{"add_generation_prompt": false}', "sets add_generation_prompt, which depends on the row"),
    ],
)
def test_bad_variables_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        with_template_kwargs(thinking_tokenizer("qwen3"), given)
