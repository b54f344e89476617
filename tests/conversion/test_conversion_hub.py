"""EAGLE checkpoints fetched from a Hub: one format of the weights, no subfolders, the requested revision."""

import io
import json

import pytest
import torch
from helpers.eagle_checkpoints import LLAMA, eagle1_tensors, write
from helpers.tiny_models import make_target, make_tokenizer
from safetensors.torch import load_file, save, save_file

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter
from coral_hf.cli import main
from coral_hf.commands import loading


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


def pickled(tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def fetched(server, repo: str) -> set[str]:
    """Paths of the files that were downloaded, not only queried."""
    gets = [line.split()[1] for line in server.requests if line.startswith("GET ") and "/resolve/" in line]
    return {path.split("/resolve/")[1].split("/", 1)[1] for path in gets if path.startswith(f"/{repo}/")}


def files(form: str) -> dict[str, bytes]:
    """A repository with its weights in the given form, and files that must not be fetched."""
    tensors = eagle1_tensors()
    names = sorted(tensors)
    parts = {
        "00001": {name: tensors[name] for name in names[:4]},
        "00002": {name: tensors[name] for name in names[4:]},
    }
    found = {"config.json": json.dumps(LLAMA).encode(), "README.md": b"a card", "old/model.safetensors": b"not this"}
    if form in ("safetensors", "both"):
        found["model.safetensors"] = save(tensors)
    if form in ("bin", "both"):
        found["pytorch_model.bin"] = pickled(tensors)
    if form == "shards":
        index = {name: f"model-{part}-of-00002.safetensors" for part, held in parts.items() for name in held}
        found["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
        found |= {f"model-{part}-of-00002.safetensors": save(held) for part, held in parts.items()}
        found["pytorch_model.bin"] = pickled(tensors)
    return found


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("safetensors", {"model.safetensors"}),
        ("bin", {"pytorch_model.bin"}),
        ("both", {"model.safetensors"}),
        (
            "shards",
            {
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            },
        ),
    ],
)
def test_one_form_is_fetched(form, expected, hub, target, monkeypatch):
    hub.commit("org/eagle", files(form))
    drafter = CoralDraftModel.from_eagle("org/eagle", target)
    assert torch.equal(drafter.fc.weight, eagle1_tensors()["fc.weight"])
    assert fetched(hub, "org/eagle") == {"config.json", *expected}
    # without the Hub, from the cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(CoralDraftModel.from_eagle("org/eagle", target).fc.weight, drafter.fc.weight)


def test_revision(hub, target, tmp_path, capsys):
    first = hub.commit("org/eagle", files("safetensors"))
    tensors = {name: tensor + 1 for name, tensor in eagle1_tensors().items()}
    hub.commit("org/eagle", {"model.safetensors": save(tensors)})
    newest, older = (CoralDraftModel.from_eagle("org/eagle", target, revision=name) for name in (None, first))
    assert torch.equal(newest.fc.weight, older.fc.weight + 1)
    with pytest.raises(OSError, match="fetching it from the Hub failed"):
        CoralDraftModel.from_eagle("org/eagle", target, revision="no-such-branch")
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    places = [str(tmp_path / "out"), "--target", str(tmp_path / "target")]
    assert main(["convert", "--from", "eagle", "org/eagle", *places, "--revision", first]) == 0
    assert torch.equal(CoralDraftModel.from_pretrained(tmp_path / "out").fc.weight, older.fc.weight)
    assert main(["convert", "--to", "vllm", str(tmp_path / "out"), str(tmp_path / "vllm"), "--revision", "main"]) == 2
    assert "--revision main" in capsys.readouterr().err


def test_repositories_that_are_none(hub, target):
    hub.commit("org/empty", {"README.md": b"a card"})
    with pytest.raises(ValueError, match=r"contains no config\.json"):
        CoralDraftModel.from_eagle("org/empty", target)
    with pytest.raises(OSError, match="'org/absent' is not a local folder"):
        CoralDraftModel.from_eagle("org/absent", target)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_convert_reads_the_ends_of_the_target(family, shard, tmp_path, monkeypatch):
    target = make_target(family, dtype=torch.float32)
    target.save_pretrained(tmp_path / "target", max_shard_size=shard)
    assert (tmp_path / "target" / "model.safetensors").exists() == (shard == "1GB")
    ends = loading.load_target_ends(str(tmp_path / "target"), "float32")
    adapter, whole = TargetAdapter(ends), TargetAdapter(target)
    assert torch.equal(adapter.embedding.weight, whole.embedding.weight)
    assert torch.equal(adapter.head.weight, whole.head.weight) and adapter.embedding_scale == whole.embedding_scale
    assert any(parameter.is_meta for parameter in ends.parameters())
    # a checkpoint that brings a copy of each is compared with them
    tensors = {"embed_tokens.weight": whole.embedding.weight, "lm_head.weight": whole.head.weight}
    write(tmp_path / "eagle", LLAMA, {**eagle1_tensors(), **{key: value.clone() for key, value in tensors.items()}})
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    arguments = ["convert", "--from", "eagle", str(tmp_path / "eagle"), str(tmp_path / "out")]
    assert main([*arguments, "--target", str(tmp_path / "target"), "--dtype", "float32"]) == 0
    config = CoralDraftConfig.from_pretrained(tmp_path / "out")
    assert (config.target_name_or_path, config.target_model_type) == (str(tmp_path / "target"), family)


def test_a_target_with_other_names_is_loaded_whole(target, tmp_path):
    folder = tmp_path / "target"
    target.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    renamed = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = loading.load_target_ends(str(folder), "float32")
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(loaded.get_input_embeddings().weight, target.get_input_embeddings().weight)
