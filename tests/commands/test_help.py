"""`coral-hf VERB --help`: groups, one spelling, defaults once, three examples; errors of one line."""

import re

import pytest

from coral_hf.cli import COMMANDS, main
from coral_hf.commands.parsing.parser import parser_of


def help_of(verb: str, capsys, option: str = "--help") -> str:
    with pytest.raises(SystemExit) as stop:
        main([verb, option])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_can_be_read(verb, capsys):
    text = help_of(verb, capsys)
    assert text.startswith(f"usage: coral-hf {verb}")
    examples = text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert sum(line.strip().startswith(f"coral-hf {verb}") for line in examples) == 3
    assert not re.search(r"^ *--\w+_\w", text, re.MULTILINE), "options are listed with dashes"
    for action in parser_of(verb, COMMANDS[verb])._actions:
        entry = parser_of(verb, COMMANDS[verb])._get_formatter()._get_help_string(action) or ""
        assert entry.count("(default") <= 1 and "default: None" not in entry and "default: []" not in entry


def test_the_package_s_own_settings_come_first(capsys):
    short, whole = help_of("train", capsys), help_of("train", capsys, "--help-all")
    headings = re.findall(r"^(\S.*):$", short, re.MULTILINE)
    assert headings[-6:] == ["options", "target", "data", "drafter", "method", "run"]
    assert len(short.splitlines()) < 180 < 300 < len(whole.splitlines())
    assert "--fsdp" in whole and "--fsdp" not in short and "--help-all" in short
    for option in (
        "--target",
        "--data",
        "--learning-rate",
        "--rollout-schedule",
        "--output",
        "--resume-from-checkpoint",
    ):
        assert re.search(rf"^  {option} ", short, re.MULTILINE), option


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "x", "--lr", "1e-3"], "unknown option or argument '--lr'; did you mean --learning-rate?"),
        (["train", "--data", "x", "--batch_size", "2"], "did you mean --per-device-train-batch-size?"),
        (["train", "--data", "x", "--batch-size=2"], "did you mean --per-device-train-batch-size?"),
        (["train", "--dataset", "x", "--output", "o"], "give --data"),
        (["train", "--data", "x"], "No output folder: give one with --output"),
        (
            ["train", "--data", "x", "--output", "o", "--packing", "maybe"],
            "--packing: Truthy value expected: got maybe",
        ),
        (["train", "--data", "x", "--output", "o", "--max-steps", "many"], "--max-steps: invalid int value: 'many'"),
        (["verify", "--data", "x", "--model", "y"], "'--model'; did you mean --target?"),
        (["benchmark", "--method", "coral"], "give --output"),
        (["tune", "--output", "o"], "give --data"),
        (["convert", "a"], "give output"),
        (["regenerate", "--prompts", "x", "--output", "y", "--steps", "3"], "`coral-hf regenerate --help` lists"),
    ],
)
def test_usage_errors_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    error = captured.err.strip()
    assert message in error and "\n" not in error and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["benchmark", "tune", "verify", "regenerate", "train"])
def test_output_has_one_name_everywhere(verb):
    words = {"regenerate": ["--prompts", "x"]}.get(verb, ["--data", "x"])
    for option in ("--output", "--output_dir"):
        parsed, *more = parser_of(verb, COMMANDS[verb]).parse_args_into_dataclasses(args=[*words, option, "there"])
        assert getattr(more[0] if more else parsed, "output_dir" if more else "output") == "there"
