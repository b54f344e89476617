"""The inputs of a training: arguments and their presets, drafters, tokenizers and rows, and the refusals."""

import dataclasses
import inspect
import re

import pytest
import torch
from helpers.tiny_models import TEMPLATE, make_drafter, make_target, make_tokenizer
from helpers.tiny_trainings import make_args, make_trainer, quick_drafter, random_rows
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from coral_hf import CoralDraftModel
from coral_hf.cli import main
from coral_hf.commands import loading
from coral_hf.data.dataset import ConversationDataset
from coral_hf.data.response_origin import Origin
from coral_hf.generation.key_values.slot_cache import SlotCache
from coral_hf.training import arguments
from coral_hf.training.arguments import CoralTrainingArguments, parse_schedule
from coral_hf.training.losses.chunked_pass import default_chunk_size
from coral_hf.training.run import unused_settings
from coral_hf.training.run.publishing import recipe
from coral_hf.training.trainer import CoralTrainer
from coral_hf.training.training_rows import encode_dataset
from coral_hf.utils.compat import checkpointing_argument


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "eagle", "csra_weight": 0.1}, r"csra_weight=0.1 with rollout_schedule='1'.*K >= 2"),
        ({"preset": "coral", "rollout_schedule": "1"}, "there is only K=1"),
        ({"preset": "medusa"}, "preset='medusa' is unknown"),
        ({"rollout_schedule": "1:0.5,3:0.4"}, "the fractions must sum to 1"),
        ({"rollout_schedule": "1:x"}, "write 'K' or 'K:fraction,K:fraction'"),
        ({"rollout_schedule": "0"}, "with K >= 1"),
        ({"csra_temperature": 0.0}, "csra_temperature=0.0 must be positive"),
        ({"step_decay": 0.0}, "step_decay=0.0 must be positive"),
        ({"feature_noise": -0.1}, "feature_noise=-0.1 must not be negative"),
        ({"loss_negatives": -1}, "loss_negatives=-1 must not be negative"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0 must be at least 1"),
        ({"regression_loss_weight": -1.0}, "regression_loss_weight=-1.0 must not be negative"),
        ({"topk_loss_weight": -1.0}, "topk_loss_weight=-1.0 must not be negative"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1 would have no effect: .*whole distribution"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5.0 would have no effect: .*feature_noise"),
        ({"bf16_full_eval": True}, r"bf16_full_eval=True would have no effect: .*bf16=True"),
        ({"include_num_input_tokens_seen": "all"}, r"include_num_input_tokens_seen='all' .*response_tokens"),
        ({"include_num_input_tokens_seen": True}, r"include_num_input_tokens_seen='all' .*response_tokens"),
        (
            {"include_for_metrics": ["loss"]},
            r"include_for_metrics=\['loss'\] would have no effect: .*trainer.evaluate\(\)",
        ),
        ({"eval_accumulation_steps": 2}, "eval_accumulation_steps=2 would have no effect"),
        ({f"{checkpointing_argument()}_kwargs": {"use_reentrant": True}}, "Leave use_reentrant out"),
    ],
)
def test_contradictory_arguments_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


def test_functions_that_would_not_be_called_are_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    given = {"target_model": target, "args": make_args(tmp_path), "train_dataset": random_rows(4)}
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"{name} would not be called: "):
            CoralTrainer(model=quick_drafter(target), **given, **{name: len})
    with pytest.raises(ValueError, match="model_init would not be called: pass the drafter as model"):
        CoralTrainer(model=None, model_init=lambda: quick_drafter(target), **given)
    with pytest.raises(NotImplementedError, match=r"Use evaluate\(rows\) to measure it"):
        CoralTrainer(model=quick_drafter(target), **given).predict(random_rows(4))


def test_what_a_training_has_no_use_for_is_a_setting_of_transformers():
    names = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    assert names >= set(unused_settings.ARGUMENTS)
    defaults = TrainingArguments(output_dir="none", use_cpu=True)
    assert {name: getattr(defaults, name) for name in unused_settings.ARGUMENTS} == {
        name: unused for name, (unused, _) in unused_settings.ARGUMENTS.items()
    }
    assert set(inspect.signature(Trainer.__init__).parameters) >= set(unused_settings.PARAMETERS)


def test_a_target_with_a_head_of_another_kind_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    target.config.logits_scaling = 2.0  # which Llama does not divide by
    with pytest.raises(ValueError, match=r"differs by .* from the logits of LlamaForCausalLM: .*wrong ones"):
        CoralTrainer(drafter, target_model=target, args=make_args(tmp_path), train_dataset=random_rows(4))


@pytest.mark.parametrize("native", [False, True])
def test_bf16_by_default_where_the_hardware_multiplies_it(native, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "native_bfloat16", lambda device=None: native)
    assert make_args(tmp_path, bf16=None).bf16 is native
    assert make_args(tmp_path, bf16=not native).bf16 is not native
    monkeypatch.setattr(loading, "native_bfloat16", lambda device=None: native)
    assert loading.resolve_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert loading.resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_presets_and_schedules(tmp_path):
    assert parse_schedule("3") == [(3, 1.0)]
    assert parse_schedule("1:0.6,3:0.4") == [(1, 0.6), (3, 0.4)]
    args = make_args(tmp_path, rollout_schedule="1:0.5,2:0.25,3:0.25")
    assert [args.rollout_steps_at(x) for x in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [1, 1, 2, 2, 3, 3]
    presets = {name: make_args(tmp_path, preset=name) for name in ("eagle", "hass", "coral")}
    assert {name: (args.rollout_schedule, bool(args.csra_weight)) for name, args in presets.items()} == {
        "eagle": ("1", False),
        "hass": ("1:0.6,3:0.4", False),
        "coral": ("1:0.6,3:0.4", True),
    }
    paper = make_args(tmp_path, paper_weights=True)
    assert (paper.regression_loss_weight, paper.classification_loss_weight) == (1.0, 0.1)


def test_a_drafter_of_other_sizes_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    for name, value in (("vocab_size", 64), ("hidden_size", 64)):
        drafter = make_drafter(target)
        setattr(drafter.config, name, value)
        with pytest.raises(ValueError, match=rf"made for a target with {name}={value} .* but LlamaForCausalLM has"):
            make_trainer(tmp_path, target, drafter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_drafters_are_trained_in_float32(dtype, tmp_path, caplog):
    target = make_target()
    drafter = quick_drafter(target, dtype=dtype)
    drafter.add_router(8)
    half = dtype in (torch.bfloat16, torch.float16)
    trainer = make_trainer(tmp_path, target, drafter, max_steps=1)
    trainer.train()
    expected = torch.float32 if half else dtype
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {expected}
    message = f"The drafter's {str(dtype)[6:]} weights were cast to float32"
    assert [record.getMessage()[: len(message)] for record in caplog.records].count(message) == half
    trainer.save_model()
    assert CoralDraftModel.from_pretrained(tmp_path, dtype="auto").dtype == expected


def test_a_half_precision_drafter_is_adapted_in_float32(tmp_path):
    peft = pytest.importorskip("peft")
    target = make_target(dtype=torch.float32)
    drafter = quick_drafter(target, dtype=torch.bfloat16)
    trainer = CoralTrainer(
        drafter, target, make_args(tmp_path, max_steps=1), random_rows(4), peft_config=peft.LoraConfig(r=2)
    )
    trainer.train()
    trainer.save_model()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert CoralDraftModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32


def test_a_drafter_with_a_head_of_its_own_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"draft_vocab_size=64.*Train a drafter that uses the target"):
        make_trainer(tmp_path, target, quick_drafter(target, draft_vocab_size=64))


def test_long_conversations_are_cut_and_other_columns_left_out(tmp_path, capsys):
    rows = [{**row, "topic": "birds"} for row in random_rows(4)]
    longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    trainer = make_trainer(
        tmp_path,
        make_target(dtype=torch.float32),
        rows=rows,
        max_length=longest - 1,
        remove_unused_columns=True,
        max_steps=1,
    )
    assert f"conversations cut at max_length={longest - 1}; 0 left out" in capsys.readouterr().out
    trainer.train()
    assert trainer.state.global_step == 1


def test_another_tokenizer_is_refused(tmp_path):
    def tokenizer(words):
        core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
        return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0])

    target = make_target(dtype=torch.float32)
    ours, other = tokenizer(["a", "b", "c"]), tokenizer(["a", "c", "b"])
    drafter = CoralDraftModel.from_target(target, tokenizer=ours)
    rows = random_rows(2)
    kwargs = {"model": drafter, "target_model": target, "args": make_args(tmp_path), "train_dataset": rows}
    CoralTrainer(**kwargs, processing_class=ours)
    with pytest.raises(ValueError, match=r"vocabulary hash .* is not the drafter's"):
        CoralTrainer(**kwargs, processing_class=other)


def test_data_of_another_tokenizer_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    rows = [{"prompt_ids": [1, 2], "response_ids": [3, 128]}]
    with pytest.raises(ValueError, match="token id 128, but the target's vocabulary ends at 127"):
        make_trainer(tmp_path, target, rows=rows)
    with pytest.raises(ValueError, match="token id 128"):
        make_trainer(tmp_path, target).evaluate(eval_dataset=rows)


def test_a_training_without_response_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No conversation has a response token within max_length=3"):
        make_trainer(tmp_path, make_target(dtype=torch.float32), max_length=3)


def test_several_gpus_of_one_process_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments.CoralTrainingArguments, "n_gpu", property(lambda args: 2))
    remedy = r"2 GPUs are visible to one process.*accelerate launch.*CUDA_VISIBLE_DEVICES"
    with pytest.raises(ValueError, match=remedy):
        make_trainer(tmp_path, make_target(dtype=torch.float32))
    # before files are read or models loaded
    words = ["train", "--data", "absent.jsonl", "--target", "absent", "--output_dir", str(tmp_path)]
    assert main([*words, "--report_to", "none", "--use_cpu", "true"]) == 2
    assert re.search(remedy, capsys.readouterr().err)


def test_what_was_left_out_is_said_once(tmp_path, capsys, monkeypatch):
    rows = [*random_rows(4), {"prompt_ids": [5], "response_ids": [7]}]  # too short for a drafter, but not cut
    args = make_args(tmp_path)
    assert len(encode_dataset(rows, None, args)) == 4
    assert "0 conversations cut at max_length=2048; 1 left out" in capsys.readouterr().out
    monkeypatch.setattr(type(args), "process_index", property(lambda args: 1))
    assert len(encode_dataset(rows, None, args)) == 4
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a text", "another"], "row 0 contains a prompt without an answer"),
        ({"a": ["a text"]}, "row 0 contains a prompt without an answer"),
        ([3], "row 0 is '3', of type int, but a row is an object or a string"),
    ],
)
def test_rows_that_are_no_objects_are_refused(rows, message, tmp_path):
    given = {"eval_dataset": rows} if isinstance(rows, dict) else {"rows": rows}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_target(dtype=torch.float32), **given)


def test_chunks_of_the_loss_by_device(tmp_path):
    sizes = [
        default_chunk_size(*what) for what in (("cpu", 49152), ("cuda", 49152), ("cuda", 262144), ("cpu", 262144))
    ]
    assert sizes == [256, 2048, 1024, 256]
    trainer = make_trainer(tmp_path, make_target(dtype=torch.float32), loss_chunk_size=None)
    assert trainer._chunk_size == 256
    assert "loss_chunk_size" not in recipe(trainer.args)


def test_the_recipe_is_what_was_given(tmp_path):
    """It does not record a default that other arguments or the machine changed."""
    where = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    assert recipe(CoralTrainingArguments(**where)) == {"preset": "recipe"}
    given = {"preset": "hass", "learning_rate": 1e-3, "rollout_schedule": "3", "lr_scheduler_type": "constant"}
    assert recipe(CoralTrainingArguments(**where, **given, packing=False)) == given
    trainer = make_trainer(tmp_path, make_target(dtype=torch.float32), max_steps=1)
    before = recipe(trainer.args)
    assert not {"rollout_schedule", "csra_weight", "accelerator_config", "debug"} & set(before)
    assert before["max_steps"] == 1 and before["preset"] == "coral"
    trainer.train()
    assert recipe(trainer.args) == before
    trainer.args.weight_decay, trainer.args.deepspeed = 0.1, "/home/someone/zero2.json"
    assert recipe(trainer.args) == {**before, "weight_decay": 0.1, "deepspeed": "zero2.json"}


def test_conversations_past_the_targets_positions_are_refused(tmp_path):
    target, long = make_target(dtype=torch.float32), {"prompt_ids": [5] * 300, "response_ids": [7] * 213}
    message = r"A conversation has 513 tokens, but the target has only 512 positions .*max_length=512"
    for given in ({"rows": [long]}, {"eval_dataset": [long]}, {"rows": RowStreamOf([long]), "max_steps": 1}):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, target, **given).train()
    trainer = make_trainer(tmp_path, target, rows=[long], max_length=512)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(ConversationDataset([long]))


class RowStreamOf:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_target_on_several_devices_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    target.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": "cpu"}
    message = r"The target lies on several devices \(0, 1, cpu\).*without a device_map.*shard_target"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, target)
    with pytest.raises(ValueError, match=message):
        SlotCache(target, 2)


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_end_as_the_targets_generation_config_says(streamed, tmp_path, capsys):
    rows, target = [{"turns": ["hi"], "responses": ["yo"]}], make_target()
    stream = pytest.importorskip("datasets").Dataset.from_list(rows).to_iterable_dataset()
    tokenizer = make_tokenizer(
        TEMPLATE.replace("{% endfor %}", "{{ '<2>~' if message.role == 'assistant' }}{% endfor %}")
    )
    tokenizer.eos_token = "<1>"
    target.generation_config.eos_token_id = [2]
    CoralTrainer(
        model=quick_drafter(target),
        target_model=target,
        args=make_args(tmp_path, max_steps=1),
        train_dataset=stream if streamed else rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    assert "[a]⟦yo<2>⟧\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_answers_of_another_target_are_told_of_once(streamed, tmp_path, capsys):
    target = make_target()
    target.config._commit_hash, target.config._name_or_path = "bbbb", "org/name"
    sample = Origin.of(target).target_weights
    for columns, warned in (
        ({}, False),
        ({"target": "an endpoint's"}, False),
        ({"target": "org/name", "target_revision": "bbbb", "target_weights": sample}, False),
        ({"target": "org/name", "target_revision": "aaaa"}, True),
        ({"target": "org/name", "target_weights": "0123"}, True),
    ):
        rows = [{**row, **columns} for row in random_rows(8)]
        stream = pytest.importorskip("datasets").Dataset.from_list(rows).to_iterable_dataset()
        trainer = make_trainer(tmp_path, target, rows=stream if streamed else rows, max_steps=4)
        trainer.train()
        told = capsys.readouterr().out
        assert told.count("contains an answer of org/name") == warned, columns
        assert f"the target of this training is org/name at revision bbbb (weights {sample})" in told or not warned
