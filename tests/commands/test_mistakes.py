"""Beginners' mistakes: each gives one line with the remedy, or it simply works."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from helpers.tiny_trainings import make_args, random_rows
from transformers import TrainingArguments

from coral_hf import CoralDraftModel
from coral_hf.cli import main
from coral_hf.commands.loading import resolve_dtype
from coral_hf.data import chat
from coral_hf.data.response_origin import Origin, check_same_run
from coral_hf.evaluation.benchmark import slower_than_plain
from coral_hf.training.trainer import CoralTrainer


ROOT = Path(__file__).parents[2]


def refused(capsys, *words: str) -> str:
    """The one line with which a command ends in status 2."""
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("coral-hf ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def rows(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"id": str(i), "prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + i, 3]} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


TRAIN = ["train", "--target", "target", "--dtype", "float32", "--data", "rows.jsonl", "--output", "out"]
TRAIN += ["--report_to", "none", "--tune", "false", "--max-steps", "1"]


def test_a_second_training_into_the_same_folder(rows, capsys):
    assert main([*TRAIN, "--save-steps", "1"]) == 0
    capsys.readouterr()
    error = refused(capsys, *TRAIN)
    assert all(remedy in error for remedy in ("--resume_from_checkpoint last", "another --output", "--overwrite"))


def test_prompts_given_to_train(rows, capsys):
    error = refused(capsys, *TRAIN, "--data", "prompts.jsonl")
    assert "coral-hf regenerate" in error


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--lr", "1e-3"], "did you mean --learning-rate?"),
        (["--batch_size", "2"], "did you mean --per-device-train-batch-size?"),
        (["--packing", "maybe"], "--packing: Truthy value expected: got maybe"),
        (["--shape", "eagle4"], "--shape 'eagle4' is unknown; choose eagle or eagle3"),
        (["--config-overrides", "{"], "is not JSON"),
    ],
)
def test_slips_of_the_pen_in_train(words, remedy, rows, capsys, monkeypatch):
    monkeypatch.setattr("coral_hf.commands.loading.load_target", None)  # reported before anything is loaded
    assert remedy in refused(capsys, *TRAIN, *words)


def test_no_output(rows, capsys):
    assert "give one with --output" in refused(capsys, "train", "--data", "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("torch.bfloat16", torch.bfloat16),
    ],
)
def test_dtypes_by_their_other_names(name, dtype):
    assert resolve_dtype(name, torch.device("cpu")) == dtype


def test_last_without_a_checkpoint(rows, capsys):
    assert main([*TRAIN, "--resume-from-checkpoint", "last"]) == 0
    assert "out contains no checkpoint to resume from: training starts from the beginning." in capsys.readouterr().out


def test_a_drafter_of_ours_to_convert(rows, capsys):
    error = refused(capsys, "convert", "--from", "eagle", "drafter", "new", "--target", "target")
    assert "this is a CORAL drafter already" in error


def test_convert_without_the_target(rows, capsys):
    assert "name it with --target" in refused(capsys, "convert", "--from", "eagle", "target", "new")


def test_answers_of_another_target_are_refused_with_advice_that_works():
    here = Origin("here", None, "1" * 40)
    for revision, advised in (("a wheel of that name, 0.1.2", False), ("f" * 40, True)):
        row = {"target": "there", "target_revision": revision, "target_weights": "2" * 40}
        with pytest.raises(ValueError, match="give another output file") as found:
            check_same_run(row, "line 1", 0.0, here)
        assert (f"--target_revision {revision}" in str(found.value)) is advised


def test_some_of_the_prompts_again(rows, capsys):
    command = ["regenerate", "--target", "target", "--dtype", "float32", "--max-new-tokens", "4", "--slots", "4"]
    command += ["--max-prompt-tokens", "64", "--output", "answers.jsonl"]
    assert main([*command, "--prompts", "prompts.jsonl"]) == 0
    first = (rows / "prompts.jsonl").read_text().splitlines(keepends=True)
    (rows / "some.jsonl").write_text("".join(first[:2]))
    capsys.readouterr()
    assert main([*command, "--prompts", "some.jsonl"]) == 0
    assert "2 answers to these prompts were on file already; 0 are new." in capsys.readouterr().out


def test_names_where_transformers_users_pass_names(rows):
    drafter = CoralDraftModel.from_target("target")
    assert drafter.config.hidden_size == 32
    trainer = CoralTrainer("drafter", "target", make_args(rows / "x", max_steps=1), train_dataset=random_rows(8))
    trainer.train()
    assert trainer.state.global_step == 1
    from_file = CoralTrainer(drafter, "target", make_args(rows / "y"), train_dataset="rows.jsonl")
    assert len(from_file.train_dataset) == 12


def test_swapped_models_and_plain_arguments(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert CoralTrainer(drafter, target, plain, train_dataset=random_rows(4)).args.rollout
    with pytest.raises(ValueError, match=r"model and target_model are swapped.*Pass model=drafter"):
        CoralTrainer(target, drafter, train_dataset=random_rows(4))


def test_a_tokenizer_without_a_chat_template_is_said_once(caplog):
    chat._say_once.cache_clear()
    tokenizer = make_tokenizer(chat_template=None)
    for _ in range(2):
        chat.encode_messages(tokenizer, [{"role": "user", "content": "hello"}], "here")
    assert sum("has no chat template" in record.message for record in caplog.records) == 1


def test_a_drafter_that_is_slower_than_plain():
    rows = [
        {"benchmark": "all", "method": name, "speedup": speedup, "acceptance_length": tau}
        for name, speedup, tau in (("plain", 1.0, 1.0), ("coral", 0.44, 1.3), ("prompt_lookup", 0.9, None))
    ]
    said = slower_than_plain({"runs": rows})
    assert said.startswith("coral was slower than plain generate (0.44x") and "coral-hf tune --save true" in said
    rows[1]["speedup"] = 1.2
    assert slower_than_plain({"runs": rows}) is None


def test_control_c_in_a_training_says_how_to_resume(rows, capsys, monkeypatch):
    whole = CoralTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(CoralTrainer, "training_step", stop)
    assert main([*TRAIN, "--max-steps", "3", "--save-steps", "1"]) == 130
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the last checkpoint is out/checkpoint-1; resume with the same command and" in error
    assert error.endswith("--resume-from-checkpoint last.")


def test_what_transformers_says_has_an_answer():
    """Messages of Transformers that our messages cannot replace."""
    page = (ROOT / "docs" / "faq.md").read_text()
    for asked in ("AutoModelForCausalLM", "pipeline(", "trust_remote_code", "draft_depth=3", "chat_template"):
        assert asked in page
