"""Several processes for real: two gloo ranks through `accelerate launch` train as one process with the doubled batch."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_target, make_tokenizer
from helpers.tiny_trainings import assert_same_weights, make_args, make_trainer, quick_drafter, random_rows, weights

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.data.dataset import ConversationDataset
from coral_hf.training.low_rank_trainer import CoralLowRankTrainer
from coral_hf.training.run.placement import decoder_layers, place_target, plain_sharding
from coral_hf.utils.compat import checkpointing_argument, enable_checkpointing


pytestmark = pytest.mark.slow


PROGRAM = Path(__file__).parents[1] / "helpers" / "training_process.py"
EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = {
    "preset": "hass",  # CSRA contrasts the rows of one process, so that its loss depends on their number
    "rollout_schedule": "1:0.5,3:0.5",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.5,
}
# `--cpu` would start one process only; the arguments' `use_cpu` makes the ranks talk through gloo
LAUNCH = {
    "ddp": ["--multi_gpu"],
    "fsdp": [
        "--use_fsdp",
        "--fsdp_cpu_ram_efficient_loading=false",
        "--fsdp_version=2",
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "--fsdp_state_dict_type=SHARDED_STATE_DICT",
    ],
}


def launch(kind: str, program: Path, *arguments: str, port: int) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    command += [f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no"]
    command += LAUNCH[kind]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(str(PROGRAM.parents[place]) for place in (2, 1))
    # 10 seconds alone; beside other work on two cores, ranks that wait for each other have taken minutes
    result = subprocess.run(
        [*command, str(program), *arguments], env=environment, capture_output=True, text=True, timeout=450
    )
    assert result.returncode == 0, result.stderr[:6000]
    return result.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Log, weights and evaluation of one process with the doubled batch."""
    folder = tmp_path_factory.mktemp("one")
    rows, held_out = random_rows(16), random_rows(5, seed=3)  # the ranks' batches do not divide 5
    settings = {**SETTINGS, "per_device_train_batch_size": 4}
    trainer = make_trainer(folder, make_target(dtype=torch.float64), None, rows, held_out, **settings)
    trainer.train()
    return trainer.state.log_history, weights(trainer.model), trainer.evaluate()


@pytest.mark.parametrize("kind", list(LAUNCH))
def test_two_processes_are_one_with_the_doubled_batch(kind, tmp_path, one_process):
    history, expected, metrics = one_process
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2}
    if kind == "fsdp":
        settings["shard_target"] = True
    options = {"output": str(tmp_path), "settings": settings, "dtype": "float64", "evaluate": True}
    launch(kind, PROGRAM, json.dumps(options), port=29610 + list(LAUNCH).index(kind))
    found = json.loads((tmp_path / "result.json").read_text())
    names = (
        "loss",
        "grad_norm",
        "classification_1",
        "regression_3",
        "acceptance_1",
        "acceptance_3",
        "response_tokens",
    )
    rows = [(row, other) for row, other in zip(history, found["history"], strict=False) if "loss" in row]
    assert len(rows) == 4
    for row, other in rows:
        for name in (name for name in names if name in row):
            assert other[name] == pytest.approx(row[name], rel=1e-5), name  # sums of the log are float32
    for name in ("eval_loss", "eval_acceptance_1", "eval_acceptance_length"):
        assert found["metrics"][name] == pytest.approx(metrics[name], rel=1e-5), name
    trained = CoralDraftModel.from_pretrained(tmp_path)
    assert_same_weights(expected, weights(trained), rtol=0, atol=1e-7)
    # a checkpoint contains both ranks' generators, no target, and nothing of it is left half-written
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    if kind == "ddp":
        return
    assert any("fsdp" in path.name for path in (tmp_path / "checkpoint-2").iterdir()), "the state is sharded"
    # going on from the middle ends in the same weights
    resumed = tmp_path / "resumed"
    options |= {"output": str(resumed), "resume": str(tmp_path / "checkpoint-2"), "seed": 9}
    options["internal_save"] = True  # whole as well, whatever the state of a checkpoint
    launch(kind, PROGRAM, json.dumps(options), port=29620)
    assert_same_weights(weights(trained), weights(CoralDraftModel.from_pretrained(resumed)), rtol=0, atol=1e-9)


def test_tokens_of_all_processes_are_counted(tmp_path):
    """Also where each averages its loss over its own."""
    settings = {**SETTINGS, "average_tokens_across_devices": False, "max_steps": 4}
    launch("ddp", PROGRAM, json.dumps({"output": str(tmp_path), "settings": settings}), port=29660)
    history = json.loads((tmp_path / "result.json").read_text())["history"]
    seen = [entry["response_tokens"] for entry in history if "loss" in entry]
    assert seen[-1] == 2 * ConversationDataset(random_rows(16)).num_response_tokens


def test_a_routed_drafter_is_trained_on_by_several_processes(tmp_path):
    """No loss reaches its router, for whose gradients the processes would wait."""
    options = {"output": str(tmp_path), "settings": {**SETTINGS, checkpointing_argument(): True}, "router_groups": 8}
    launch("ddp", PROGRAM, json.dumps(options), port=29650)
    assert CoralDraftModel.from_pretrained(tmp_path).router.num_groups == 8


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.exhaustive), "fsdp"])
def test_a_low_rank_head_is_trained_by_several_processes(kind, tmp_path):
    """Its gradients are computed within the forward, where it is whole, and reach all processes."""
    settings = {**SETTINGS, "preset": "recipe", "stage": "low_rank", "learning_rate": 5.0}
    options = {"output": str(tmp_path / "two"), "settings": settings, "dtype": "float64", "low_rank_size": 6}
    launch(kind, PROGRAM, json.dumps(options), port=29670 + list(LAUNCH).index(kind))
    target = make_target(dtype=torch.float64)
    drafter = quick_drafter(target)
    drafter.add_low_rank_head(target, 6)
    before = weights(drafter)
    arguments = make_args(tmp_path / "one", **{**settings, "per_device_train_batch_size": 4})
    CoralLowRankTrainer(drafter, target, arguments, random_rows(16)).train()
    two = weights(CoralDraftModel.from_pretrained(tmp_path / "two", dtype=torch.float64))
    assert_same_weights(weights(drafter), two, rtol=0, atol=1e-7)
    changed = {name for name, tensor in two.items() if not torch.equal(tensor, before[name])}
    assert changed == {"low_rank.down_proj.weight", "low_rank.up_proj.weight"}


def test_a_sharded_adapted_drafter_is_saved_merged(tmp_path):
    pytest.importorskip("peft")
    options = {"output": str(tmp_path / "two"), "settings": SETTINGS, "dtype": "float64", "lora_rank": 2}
    launch("fsdp", PROGRAM, json.dumps(options), port=29640)
    options |= {"output": str(tmp_path / "one"), "settings": {**SETTINGS, "per_device_train_batch_size": 4}}
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(str(PROGRAM.parents[place]) for place in (2, 1)),
    }
    subprocess.run([sys.executable, PROGRAM, json.dumps(options)], env=environment, check=True, timeout=450)
    one, two = (CoralDraftModel.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("one", "two"))
    assert_same_weights(weights(one), weights(two), rtol=0, atol=1e-7)
    untrained = weights(quick_drafter(make_target(dtype=torch.float64), seed=1).double())
    changed = [name for name, tensor in weights(two).items() if not torch.equal(tensor, untrained[name])]
    assert any("q_proj" in name for name in changed) and not any("norm" in name for name in changed)
    assert {path.name for path in (tmp_path / "two" / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    assert not list((tmp_path / "two").glob("adapter_*"))


def test_accelerate_launches_the_example(tmp_path):
    """Two ranks, each with its share of a feature cache; the drafter and its one record come from the first."""
    target, data = tmp_path / "target", tmp_path / "data.jsonl"
    make_target(dtype=torch.float32).save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    data.write_text("".join(json.dumps(row) + "\n" for row in random_rows(20)))
    output = tmp_path / "out"
    arguments = ["--target", str(target), "--data", str(data), "--output_dir", str(output), "--eval_rows", "4"]
    arguments += ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    arguments += ["--cache_features", str(tmp_path / "cache"), "--per_device_train_batch_size", "2"]
    text = launch("ddp", EXAMPLES / "train_drafter.py", *arguments, port=29630)
    assert text.count("First sample") == text.count("Feature cache (forecast)") == 1
    assert text.count("eval_acceptance_length") >= 1
    assert len(list((tmp_path / "cache").glob("features-*.json"))) == 2
    record = json.loads((output / "training" / "training.json").read_text())
    assert record["steps"] == 2 and CoralDraftModel.from_pretrained(output).config.vocab_size == 128


@pytest.mark.parametrize("schedule", ["1", "3"])
@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
def test_activation_checkpointing_changes_nothing_but_memory(schedule, shape, tmp_path):
    results = []
    for checkpointing in (False, True):
        target = make_target()
        trainer = make_trainer(
            tmp_path,
            target,
            quick_drafter(target, shape),
            rollout_schedule=schedule,
            preset="hass",
            **{checkpointing_argument(): checkpointing},
            num_train_epochs=1,
        )
        trainer.train()
        results.append(weights(trainer.model))
    assert_same_weights(*results, rtol=0, atol=1e-12)


def test_activation_checkpointing_keeps_less(tmp_path):
    """Bytes saved for the backward of three steps."""
    target = make_target(dtype=torch.float32)
    drafter = quick_drafter(target).train()
    embeds, features = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    sizes = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(drafter)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            drafter(embeds, features, num_steps=3)
        sizes.append(sum(kept))
    assert sizes[1] < 0.35 * sizes[0]


def test_compiled_training_is_the_same(tmp_path):
    target = make_target()
    results = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        folder = tmp_path / str(len(results))
        trainer = make_trainer(
            folder, target, rows=random_rows(8), rollout_schedule="3", num_train_epochs=1, **settings
        )
        trainer.train()
        trainer.save_model()
        results.append(weights(CoralDraftModel.from_pretrained(folder)))
    torch._dynamo.reset()
    assert_same_weights(*results, rtol=0, atol=1e-9)


def test_placement_that_makes_no_sense_is_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    with pytest.raises(ValueError, match="shard_target=True, but there is one process only"):
        make_trainer(tmp_path, target, shard_target=True)
    with pytest.raises(ValueError, match="shard_target=True with cache_features='c'"):
        make_args(tmp_path, shard_target=True, cache_features="c")
    # a target that the user placed stays where it is
    target.hf_device_map = {"": "cpu"}
    trainer = make_trainer(tmp_path, target)
    with pytest.raises(ValueError, match="its device_map placed it already"):
        place_target(TargetAdapter(target), trainer.accelerator, shard=True)


def test_the_drafter_is_one_unit_for_fsdp_and_whole_for_deepspeed():
    fsdp = SimpleNamespace(auto_wrap_policy="layers")
    plain_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=fsdp)))
    assert fsdp.auto_wrap_policy is None
    for stage in (2, 3):
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))
        with pytest.raises(ValueError, match=r"ZeRO stage 3 .* Use stage 1 or 2") if stage == 3 else nullcontext():
            plain_sharding(accelerator)


def test_layers_to_shard_are_found_by_their_number():
    target = make_target(dtype=torch.float32)
    assert decoder_layers(TargetAdapter(target)) is target.model.layers
    target.model.layers = target.model.layers[:3]
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 4 decoder layers to shard"):
        decoder_layers(TargetAdapter(target))


def test_deepspeed_that_is_not_there_is_said(tmp_path):
    if torch.utils._import_utils._check_module_exists("deepspeed"):
        pytest.skip("deepspeed is installed")
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}))
    with pytest.raises(ImportError, match=r"(?i)deepspeed"):
        make_args(tmp_path, deepspeed=str(config))
