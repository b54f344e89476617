"""Push and load over HTTP: the real `huggingface_hub` client against a Hub-compatible server on the loopback address."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import TOKEN
from helpers.records import make_record
from helpers.tiny_models import make_drafter, make_target
from helpers.tiny_trainings import assert_same_weights, make_args, make_trainer, quick_drafter, random_rows, weights
from huggingface_hub import constants
from transformers import AutoModel, AutoModelForCausalLM, Trainer

from coral_hf import CoralDraftModel
from coral_hf.drafter.weight_files import file_sha256
from coral_hf.evaluation.environment import describe_target
from coral_hf.training.trainer import CoralTrainer


ROOT = Path(__file__).parents[2]


@pytest.fixture
def drafter():
    return make_drafter(make_target(dtype=torch.float32))


def test_push_and_load(hub, drafter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    drafter.push_to_hub("org/drafter", license="mit")
    files = hub.files("org/drafter")
    assert {"README.md", "config.json", "model.safetensors", "modeling_coral.py"} <= set(files)
    assert {"custom_generate/generate.py", "custom_generate/requirements.txt"} <= set(files)
    assert "not measured" in files["README.md"].decode()
    assert "license: mit" in files["README.md"].decode()
    for load in (CoralDraftModel, AutoModel):
        loaded = load.from_pretrained("org/drafter")
        assert type(loaded) is CoralDraftModel
        for key, value in drafter.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_revisions_private_and_cache(hub, drafter, monkeypatch):
    """Branches, commits, a private repository, and offline from the cache."""
    drafter.push_to_hub("org/drafter", token=TOKEN, private=True)
    first = hub.repos["org/drafter"]["branches"]["main"]
    with torch.no_grad():
        drafter.norm.weight.add_(1.0)
    drafter.push_to_hub("org/drafter", token=TOKEN, revision="v2")
    assert hub.repos["org/drafter"]["branches"]["main"] == first
    with pytest.raises(OSError, match="org/drafter"):
        CoralDraftModel.from_pretrained("org/drafter")
    # Transformers 5.17 loses an explicit token on its way to the config
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def load(**kwargs):
        return CoralDraftModel.from_pretrained("org/drafter", **kwargs).norm.weight

    assert torch.equal(load(revision="v2"), drafter.norm.weight)
    assert torch.equal(load(), drafter.norm.weight - 1.0)
    assert torch.equal(load(revision=first), drafter.norm.weight - 1.0)
    with pytest.raises(OSError, match="v3"):
        load(revision="v3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(load(revision="v2"), drafter.norm.weight)
    assert not hub.requests


def test_push_is_refused_before_anything_is_sent(hub, drafter, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hf auth login"):
        drafter.push_to_hub("org/drafter")
    other = {"runs": [], "drafter_sha256": "0" * 64}
    (tmp_path / "benchmark.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another drafter"):
        drafter.push_to_hub("org/drafter", token=TOKEN, record=tmp_path / "benchmark.json")
    with pytest.raises(ValueError, match="licence"):
        drafter.push_to_hub("org/drafter", token=TOKEN, licence="mit")
    with pytest.raises(ValueError, match="absent"):
        drafter.push_to_hub("org/drafter", token=TOKEN, record=tmp_path / "absent")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        drafter.push_to_hub("org/drafter", token=TOKEN)
    assert not hub.requests and not hub.repos


def test_a_repository_of_another_model_is_not_replaced(hub, drafter):
    hub.commit("org/target", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ValueError, match=r"org/target contains a model of type 'llama', which this run would replace"):
        drafter.push_to_hub("org/target", token=TOKEN)
    assert list(hub.files("org/target")) == ["config.json"]


def test_wrong_token_and_absent_repository(hub, drafter):
    with pytest.raises(PermissionError, match="write access"):
        drafter.push_to_hub("org/drafter", token="hf_wrong")
    assert not hub.repos
    with pytest.raises(OSError, match="org/absent"):
        CoralDraftModel.from_pretrained("org/absent")


def test_connection_cut_during_upload(hub, drafter):
    """One lost connection is retried; a dead one leaves the repository unchanged, and the next push succeeds."""
    hub.cuts = 1
    drafter.push_to_hub("org/drafter", token=TOKEN)
    assert hub.cuts == 0
    before = dict(hub.files("org/drafter"))
    with torch.no_grad():
        drafter.norm.weight.add_(1.0)
    hub.cuts = 100
    with pytest.raises(ConnectionError, match="Push again"):
        drafter.push_to_hub("org/drafter", token=TOKEN)
    assert hub.files("org/drafter") == before
    hub.cuts = 0
    drafter.push_to_hub("org/drafter", token=TOKEN)
    assert torch.equal(CoralDraftModel.from_pretrained("org/drafter").norm.weight, drafter.norm.weight)


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "contains no model.safetensors"),
        ({"pytorch_model.bin": b"pickle"}, "pytorch_model.bin, a pickle"),
        ({"model.safetensors": bytes(3_000_000)}, "another model's weights"),
    ],
)
def test_weights_that_are_refused(hub, drafter, tmp_path, weights, message, remote):
    drafter.config.save_pretrained(tmp_path / "folder")
    files = {"config.json": (tmp_path / "folder" / "config.json").read_bytes(), **weights}
    name = str(tmp_path / "folder")
    if remote:
        name = "org/broken"
        hub.commit(name, files)
    else:
        for path, body in weights.items():
            (tmp_path / "folder" / path).write_bytes(body)
    for load in (CoralDraftModel, AutoModel):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(name)
    # asked for, never downloaded
    assert not any(f"GET /org/broken/resolve/main/{path}" in hub.requests for path in weights)


def test_trainer_pushes(hub, tmp_path):
    target = make_target(dtype=torch.float32)
    trainer = make_trainer(tmp_path / "drafter", target, max_steps=2, eval_dataset=random_rows(4))
    with pytest.raises(ValueError, match="hf auth login"):
        trainer.push_to_hub()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "drafter" / "README.md").read_text()
    assert f"{trainer.tokens_seen:,} response tokens seen" in card and "| tau |" in card
    trainer.push_to_hub(token=TOKEN, license="apache-2.0")
    files = hub.files("org/drafter")
    assert {"README.md", "modeling_coral.py", "training/training.json", "training/log.jsonl"} <= set(files)
    assert 'from_pretrained("org/drafter"' in files["README.md"].decode()
    loaded = CoralDraftModel.from_pretrained("org/drafter", dtype="auto")
    assert torch.equal(loaded.norm.weight, trainer.model.norm.weight.cpu())


@pytest.mark.parametrize("saved_before", [False, True])
def test_the_trainer_pushes_an_adapted_drafter_merged(saved_before, hub, tmp_path):
    peft = pytest.importorskip("peft")
    folder, drafter = tmp_path / "adapted", quick_drafter(make_target(dtype=torch.float32))
    trainer = CoralTrainer(
        model=drafter,
        target_model=make_target(dtype=torch.float32, seed=4),
        args=make_args(folder, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=3e-2),
        train_dataset=random_rows(16),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8),
    )
    trainer.train()
    if saved_before:
        trainer.save_model()
    (folder / "adapter_config.json").write_text("{}")  # of an earlier version
    trainer.push_to_hub(token=TOKEN)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(hub.files("org/adapted"))
    expected = copy.deepcopy(trainer.model).merge_and_unload()
    loaded = CoralDraftModel.from_pretrained("org/adapted", dtype="auto")
    assert_same_weights(weights(expected), weights(loaded), rtol=0, atol=0)
    # a checkpoint keeps what resuming needs
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_checkpoints_of_an_adapted_drafter_are_not_pushed(tmp_path, monkeypatch):
    peft, calls = pytest.importorskip("peft"), []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: calls.append(folder))
    target = make_target(dtype=torch.float32)
    for config in (None, peft.LoraConfig(r=2)):
        trainer = CoralTrainer(
            quick_drafter(target), target, make_args(tmp_path), train_dataset=random_rows(4), peft_config=config
        )
        trainer._push_from_checkpoint("checkpoint-1")
    assert calls == ["checkpoint-1"]


WITHOUT_PACKAGE = """
import sys
sys.modules["coral_hf"] = None  # as where it is not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM

name, target_folder = sys.argv[1:]
drafter = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
assert type(drafter).__module__.startswith("transformers_modules"), type(drafter)
outputs = drafter(torch.ones(1, 4, 32), torch.ones(1, 4, 32), num_steps=2)
print(outputs.hidden_states[1].sum().item())
target = AutoModelForCausalLM.from_pretrained(target_folder)
ids = torch.tensor([[5, 9, 3, 77, 31]])
settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
remote = {"custom_generate": name, "assistant_model": drafter, "trust_remote_code": True}
try:
    target.generate(ids, **settings, **remote)
except ImportError as error:
    print(error)
del sys.modules["coral_hf"]
plain = target.generate(ids, **settings)
assert torch.equal(target.generate(ids, **settings, **remote), plain)
assert drafter.last_stats.steps > 0
"""


@pytest.mark.slow
def test_published_code_needs_no_package(hub, tmp_path):
    """Another process: the drafter as remote code, `custom_generate` without the package and with it."""
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    drafter = make_drafter(target)
    drafter.push_to_hub("org/drafter", token=TOKEN)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    arguments = ["org/drafter", str(tmp_path / "target")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    total, message = done.stdout.strip().splitlines()[-2:]
    expected = drafter(torch.ones(1, 4, 32), torch.ones(1, 4, 32), num_steps=2).hidden_states[1].sum().item()
    assert float(total) == pytest.approx(expected, abs=1e-4)
    assert "pip install coral-hf" in message


def test_the_record_travels(hub, drafter, tmp_path):
    """A measured drafter: the record beside its weights is published, and the pushed weights are the measured ones."""
    drafter.save_pretrained(tmp_path / "drafter")
    digest = file_sha256(tmp_path / "drafter" / "model.safetensors")
    (tmp_path / "drafter" / "training").mkdir()
    (tmp_path / "drafter" / "training" / "benchmark.json").write_text(json.dumps(make_record(digest)))
    loaded = CoralDraftModel.from_pretrained(tmp_path / "drafter")
    loaded.push_to_hub("org/drafter", token=TOKEN)
    card = hub.files("org/drafter")["README.md"].decode()
    assert "| 2.35 |" in card and "model-index" in card
    assert "training/benchmark.json" in hub.files("org/drafter")
    with torch.no_grad():
        loaded.norm.weight.add_(1.0)
    with pytest.raises(ValueError, match="another drafter"):
        loaded.push_to_hub("org/drafter", token=TOKEN)


def test_no_path_of_this_machine_is_published(hub, tmp_path):
    """Neither in the config nor in records, not even in those that an earlier version wrote with whole paths."""
    secret = tmp_path / "secret" / "llama-internal"
    make_target(dtype=torch.float32).save_pretrained(secret)
    target = AutoModelForCausalLM.from_pretrained(secret)
    drafter = make_drafter(target)
    drafter.save_pretrained(tmp_path / "drafter")
    digest = file_sha256(tmp_path / "drafter" / "model.safetensors")
    (tmp_path / "drafter" / "training").mkdir()
    record = {**make_record(digest), **describe_target(target), "data": [str(secret / "prompts.jsonl")]}
    assert record["target"] == "llama-internal"
    record["target"] = str(secret)
    (tmp_path / "drafter" / "training" / "benchmark.json").write_text(json.dumps(record))
    (tmp_path / "drafter" / "training" / "tune.json").write_text(
        json.dumps({"target": "work/models/llama-internal", "plain_text": "/ 2 = 3"})
    )
    kept = {"target": "Fetched from /some/place; see https://example.org/a/b."}
    (tmp_path / "drafter" / "training" / "card.json").write_text(json.dumps(kept))
    loaded = CoralDraftModel.from_pretrained(tmp_path / "drafter")
    assert loaded.config.target_name_or_path == str(secret)
    loaded.push_to_hub("org/drafter", token=TOKEN)
    files = hub.files("org/drafter")
    assert not [name for name, body in files.items() if b"secret" in body or str(tmp_path).encode() in body]
    assert json.loads(files["config.json"])["target_name_or_path"] == "llama-internal"
    published = json.loads(files["training/benchmark.json"])
    assert (published["target"], published["data"]) == ("llama-internal", ["prompts.jsonl"])
    assert json.loads(files["training/tune.json"]) == {"target": "llama-internal", "plain_text": "/ 2 = 3"}
    assert json.loads(files["training/card.json"]) == kept
    assert json.loads((tmp_path / "drafter" / "training" / "benchmark.json").read_text()) == record  # a copy is sent


@pytest.mark.parametrize("adapted", [False, True])
def test_the_trainer_publishes_no_path_and_no_pickle(adapted, hub, tmp_path):
    secret = tmp_path / "secret" / "llama-internal"
    make_target(dtype=torch.float32).save_pretrained(secret)
    target = AutoModelForCausalLM.from_pretrained(secret)
    quick_drafter(target).save_pretrained(tmp_path / "secret" / "start")
    settings = {"push_to_hub": True, "hub_model_id": "org/drafter", "hub_token": TOKEN, "hub_always_push": True}
    peft_config = pytest.importorskip("peft").LoraConfig(r=2) if adapted else None
    trainer = CoralTrainer(
        model=CoralDraftModel.from_pretrained(tmp_path / "secret" / "start"),
        target_model=target,
        args=make_args(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, **settings),
        train_dataset=random_rows(16),
        peft_config=peft_config,
    )
    trainer.train()
    trainer._finish_current_push()
    pushed = [hub.files("org/drafter")] if not adapted else []  # with every checkpoint
    assert adapted or "model.safetensors" in pushed[0]
    trainer.save_model()
    trainer.push_to_hub()
    pushed.append(hub.files("org/drafter"))
    assert "README.md" in pushed[-1] and ("adapter/adapter_config.json" in pushed[-1]) == adapted
    for files in pushed:
        assert not [name for name in files if name.endswith(".bin")]
        assert not [name for name, body in files.items() if b"secret" in body or str(tmp_path).encode() in body]
    assert not list((tmp_path / "out").glob("*.bin"))
    assert (tmp_path / "out" / "checkpoint-2" / "training_args.bin").is_file()  # which resuming reads
