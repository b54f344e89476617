"""Inputs of a trainer given by name, as plain TrainingArguments, or in the wrong place."""

import json

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from helpers.tiny_trainings import make_args, random_rows
from transformers import TrainingArguments

from coral_hf import CoralDraftModel
from coral_hf.drafter.configuration_coral import vocab_hash
from coral_hf.training import CoralTrainer, CoralTrainingArguments
from coral_hf.training.router_trainer import CoralRouterTrainer


@pytest.fixture
def folder(tmp_path):
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_rows(8)))
    return tmp_path


def test_names_are_loaded(folder, capsys):
    drafter = CoralDraftModel.from_target(str(folder / "target"))
    assert drafter.config.target_vocab_hash == vocab_hash(make_tokenizer())
    trainer = CoralTrainer(
        model=drafter,
        target_model=str(folder / "target"),
        args=make_args(folder / "out", max_steps=1),
        train_dataset=str(folder / "rows.jsonl"),
        eval_dataset=str(folder / "rows.jsonl"),
    )
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 8
    assert vocab_hash(trainer.processing_class) == vocab_hash(make_tokenizer())
    assert trainer.data_names == [str(folder / "rows.jsonl")]
    trainer.train()
    assert "Read 8 rows of " in capsys.readouterr().out
    named = CoralTrainer(folder / "drafter", folder / "target", make_args(folder / "out2"), random_rows(4))
    assert isinstance(named.model, CoralDraftModel)


def test_plain_arguments_are_taken(folder):
    given = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = CoralTrainer(folder / "drafter", folder / "target", given, random_rows(8))
    assert isinstance(trainer.args, CoralTrainingArguments)
    assert (trainer.args.max_steps, trainer.args.per_device_train_batch_size, trainer.args.report_to) == (3, 2, [])

    class OtherArguments(TrainingArguments):
        pass

    with pytest.raises(ValueError, match="args is of type OtherArguments: pass CoralTrainingArguments"):
        CoralTrainer(folder / "drafter", folder / "target", OtherArguments(output_dir="x"), random_rows(8))
    smoothing = TrainingArguments(output_dir="x", label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        CoralTrainer(folder / "drafter", folder / "target", smoothing, random_rows(8))


def test_wrong_and_swapped_models_are_named(folder):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    for trainer_class in (CoralTrainer, CoralRouterTrainer):
        for model, target_model, message in (
            (target, drafter, "model and target_model are swapped|model is a LlamaForCausalLM, not a CORAL drafter"),
            (
                target,
                target,
                "model is a LlamaForCausalLM, not a CORAL drafter: pass a new one, CoralDraftModel.from_target",
            ),
            (3, target, "model is a int, not a CORAL drafter"),
        ):
            with pytest.raises(ValueError, match=message):
                trainer_class(
                    model, target_model, make_args(folder / "out", stage=trainer_class.stage), random_rows(4)
                )
    for target_model, message in (
        (drafter, "target_model is a CORAL drafter: pass the causal LM"),
        (folder / "drafter", "target_model='.*drafter' is a CORAL drafter"),
        (None, "target_model is of type NoneType: pass a causal LM .* or its path or Hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            CoralTrainer(drafter, target_model, make_args(folder / "out"), random_rows(4))
    with pytest.raises(ValueError, match="target is a CORAL drafter"):
        CoralDraftModel.from_target(drafter)
    with pytest.raises(OSError, match="target='org/missing' is not a folder here"):
        CoralDraftModel.from_target("org/missing")
