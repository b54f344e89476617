"""The commit of a target that was loaded from the Hub in Python, found in the cache."""

import json

import pytest
import torch
from helpers.eagle_checkpoints import LLAMA, eagle1_tensors, write
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from helpers.tiny_trainings import make_trainer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter
from coral_hf.drafter.hub_names import hub_commit, public_name
from coral_hf.drafter.weight_files import drafter_sha256, file_sha256
from coral_hf.evaluation.environment import describe_target
from coral_hf.hub.model_card import render_card
from coral_hf.responses.regenerate import regenerate
from coral_hf.training.feature_cache import FeatureCache
from coral_hf.training.run.adapters import add_adapters


def push(server, folder, model, repo: str = "org/target", branch: str = "main") -> str:
    model.save_pretrained(folder)
    return server.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir()}, branch)


@pytest.fixture
def commit(hub, tmp_path):
    return push(hub, tmp_path / "pushed", make_target(dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "public"),
    [
        (None, None),
        ("", ""),
        ("gpt2", "gpt2"),
        ("org/model", "org/model"),
        ("org/data@refs/convert/parquet:main", "org/data@refs/convert/parquet:main"),
        ("/home/someone/secret/llama-internal", "llama-internal"),
        ("/home/someone/llama-internal/", "llama-internal"),
        ("~/models/llama", "llama"),
        ("../llama", "llama"),
        ("work/models/llama", "llama"),
        ("C:\\Users\\someone\\llama", "llama"),
        ("here/llama", "llama"),
    ],
)
def test_public_names(name, public, tmp_path, monkeypatch):
    (tmp_path / "here" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(name) == public


def load(**settings):
    return AutoModelForCausalLM.from_pretrained("org/target", dtype=torch.float32, **settings).eval()


def test_a_drafter_names_its_target(hub, commit, tmp_path, monkeypatch):
    target = load()
    hub.requests.clear()
    drafter = CoralDraftModel.from_target(target)
    assert (drafter.config.target_name_or_path, drafter.config.target_revision) == ("org/target", commit)
    assert describe_target(target) == {"target": "org/target", "target_revision": commit}
    drafter.save_pretrained(tmp_path / "drafter")
    card = ModelCard(render_card(tmp_path / "drafter", unmeasured=True))
    assert card.data.base_model == "org/target"
    assert 'from_pretrained("org/target"' in card.text and "not public" not in card.text
    eagle = CoralDraftModel.from_eagle(write(tmp_path / "eagle", LLAMA, eagle1_tensors()), target)
    assert eagle.config.target_revision == commit
    assert not hub.requests  # answered from the cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_commit(load().config) == commit


def test_a_folder_has_none(commit, tmp_path):
    load().save_pretrained(tmp_path / "saved")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    drafter = CoralDraftModel.from_target(target)
    assert drafter.config.target_revision is None
    drafter.save_pretrained(tmp_path / "drafter")
    card = ModelCard(render_card(tmp_path / "drafter", unmeasured=True))
    assert card.data.base_model is None and "not public" in card.text and str(tmp_path) not in card.text
    assert hub_commit(make_target().config) is None


def test_a_revision_alone_in_the_cache(hub, commit, tmp_path):
    other = push(hub, tmp_path / "v2", make_target(dtype=torch.float32, seed=1), branch="v2")
    target = load(revision="v2")
    assert hub_commit(target.config) == other != commit


def test_of_several_commits_none_is_guessed(hub, commit, tmp_path):
    """Not even that of `main`, because the target may have any revision."""
    push(hub, tmp_path / "v2", make_target(dtype=torch.float32, seed=1), branch="v2")
    target, _ = load(revision="v2"), load()
    vars(target.config).pop("_commit_hash", None)  # of Transformers before 5.24
    assert hub_commit(target.config) is None
    stated = CoralDraftConfig.from_target(target.config, target_revision="v2")
    assert stated.target_revision == "v2"
    target.config._commit_hash = commit
    assert CoralDraftConfig.from_target(target.config).target_revision == commit


def test_a_training_notices_another_commit(hub, commit, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
        "cache_features": str(tmp_path / "features"),
    }
    target = load()
    make_trainer(tmp_path / "out", target, CoralDraftModel.from_target(target), **settings).train()
    assert json.loads((tmp_path / "features" / "meta.json").read_text())["target"] == f"org/target {commit}"
    # a drafter of before, or of another commit, continues with this target
    again = make_drafter(target, target_name_or_path="org/target", target_revision=None)
    trainer = make_trainer(tmp_path / "out", target, again, **settings)
    assert trainer.target_revision == commit
    target.config._commit_hash = "0" * 40
    with pytest.raises(ValueError, match="contains features of"):
        make_trainer(tmp_path / "out", target, CoralDraftModel.from_target(target), **settings)
    del settings["cache_features"]
    trainer = make_trainer(
        tmp_path / "out", target, CoralDraftModel.from_target(target), **{**settings, "max_steps": 2}
    )
    with pytest.raises(ValueError, match=f"target_revision {commit}"):
        trainer.train(resume_from_checkpoint=True)


def test_a_cache_goes_on_where_the_commit_is_not_known(tmp_path):
    """By its name and weights, if either run did not know the commit."""
    adapter = TargetAdapter(make_target())
    for known, unknown in (("org/target abc", "org/target None"), ("org/target of a wheel", "org/target None")):
        for first, second in ((known, unknown), (unknown, known)):
            folder = tmp_path / f"{first}, {second}".replace("/", " ")
            FeatureCache(folder, adapter, first)
            FeatureCache(folder, adapter, second)
            for other in ("org/target2 None", "org/other abc"):
                with pytest.raises(ValueError, match="contains features of"):
                    FeatureCache(folder, adapter, other)
            with pytest.raises(ValueError, match="contains features of"):
                FeatureCache(folder, TargetAdapter(make_target(seed=1)), second)


def test_adapters_and_answers_name_the_commit(commit, tmp_path):
    peft = pytest.importorskip("peft")
    target = load()
    drafter = make_drafter(target, target_name_or_path="org/original", target_revision="1" * 40)
    add_adapters(drafter, peft.LoraConfig(r=2), TargetAdapter(target))
    assert (drafter.config.target_name_or_path, drafter.config.target_revision) == ("org/target", commit)
    regenerate(target, make_tokenizer(), [{"id": "p0", "turns": ["w1 w2"]}], tmp_path / "out.jsonl", max_new_tokens=2)
    assert json.loads((tmp_path / "out.jsonl").read_text())["target_revision"] == commit


def test_a_drafter_of_a_branch_is_hashed(hub, tmp_path):
    push(hub, tmp_path / "main", make_drafter(make_target()), "org/drafter")
    push(hub, tmp_path / "v2", make_drafter(make_target(), seed=2), "org/drafter", "v2")
    drafter = CoralDraftModel.from_pretrained("org/drafter", revision="v2", dtype="auto")
    assert drafter_sha256(drafter) == file_sha256(tmp_path / "v2" / "model.safetensors")
