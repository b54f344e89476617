"""Checkpoints that are not a drafter for a target: one error that lists names, expected and found, and no code run."""

import json
import os
import pickle
import random

import pytest
import torch
from helpers.eagle_checkpoints import HIDDEN, LLAMA, VOCAB, eagle1_tensors, eagle3_tensors, noise, write
from helpers.tiny_models import make_target

from coral_hf import CoralDraftModel
from coral_hf.commands.convert import import_checkpoint
from coral_hf.conversion.checkpoint_files import read_weight_file


DRAFT_IDS = torch.tensor([3, 5, 6, 20, 21])
REDUCED = {**LLAMA, "draft_vocab_size": 5}


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


def refuse(path, target, *parts):
    """Reading and converting `path` both raise one ValueError that contains all `parts`, and write nothing."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError) as error:
        CoralDraftModel.from_eagle(path, target)
    for part in parts:
        assert part in str(error.value), error.value
    with pytest.raises(ValueError):
        import_checkpoint("eagle", str(path), path.parent / "out", target)
    assert sorted(path.parent.iterdir()) == before


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


TENSOR_CASES = {
    "missing": (
        LLAMA,
        lambda: without(eagle1_tensors(), "fc.weight", "layers.0.mlp.up_proj.weight"),
        ["missing ['fc.weight', 'layers.0.mlp.up_proj.weight']"],
    ),
    "extra": (
        {**LLAMA, "architectures": ["MedusaModel"]},
        lambda: {**eagle1_tensors(), "layers.1.mlp.up_proj.weight": noise(2, 2, seed=0)},
        ["unexpected ['layers.1.mlp.up_proj.weight']", "architectures: MedusaModel"],
    ),
    "norm in EAGLE-1": (
        LLAMA,
        lambda: {**eagle1_tensors(), "layers.0.input_layernorm.weight": noise(HIDDEN, seed=0)},
        ["unexpected ['layers.0.input_layernorm.weight']"],
    ),
    "norm missing in EAGLE-3": (LLAMA, lambda: without(eagle3_tensors(), "norm.weight"), ["missing ['norm.weight']"]),
    "hidden_norm missing in EAGLE-3": (
        LLAMA,
        lambda: without(eagle3_tensors(), "midlayer.hidden_norm.weight"),
        ["missing ['layers.0.hidden_norm.weight']"],
    ),
    "norm before fc missing": ({**LLAMA, "norm_before_fc": True}, eagle3_tensors, ["missing ['input_norm.weight']"]),
    "one norm of a feature missing": (
        {**LLAMA, "fc_norm": True},
        lambda: without(eagle3_tensors(norm="fc_norm"), "fc_norm.1.weight"),
        ["missing ['fc_norm.1.weight']"],
    ),
    "norm of another width": (
        {**LLAMA, "norm_before_fc": True},
        lambda: {**eagle3_tensors(), "input_norm.weight": noise(HIDDEN, seed=0)},
        ["input_norm.weight: expected shape [96], found [32]"],
    ),
    "norms that the config does not name": (
        LLAMA,
        lambda: eagle3_tensors(norm="fc_norm"),
        ["contains ['fc_norm.0.weight', 'fc_norm.1.weight', 'fc_norm.2.weight']", "fc_norm: true", "fc_norm=True"],
    ),
    "both norms": (
        {**LLAMA, "norm_before_fc": True, "fc_norm": True},
        lambda: {**eagle3_tensors(norm="fc_norm"), **eagle3_tensors(norm="norm_before_fc")},
        ["norm_before_fc=True and fc_norm=True", "set one of the two to False"],
    ),
    "norm of one feature": (
        {**LLAMA, "fc_norm": True, "eagle_config": {"use_aux_hidden_state": False}},
        lambda: eagle3_tensors(features=1),
        ["fc_norm=True", "target_feature_layers=[-1]"],
    ),
    "fc missing in EAGLE-3": (LLAMA, lambda: eagle3_tensors(features=1), ["missing ['fc.weight']"]),
    "shape": (
        LLAMA,
        lambda: {**eagle1_tensors(), "layers.0.self_attn.k_proj.weight": noise(8, HIDDEN, seed=0)},
        ["layers.0.self_attn.k_proj.weight: expected shape [16, 32], found [8, 32]"],
    ),
    "dtype": (
        LLAMA,
        lambda: {**eagle1_tensors(), "fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN, dtype=torch.int8)},
        ["fc.weight: expected dtype", "found int8"],
    ),
    "only one of q/k/v biased": (
        LLAMA,
        lambda: {**eagle1_tensors(), "layers.0.self_attn.q_proj.bias": noise(32, seed=0)},
        ["missing ['layers.0.self_attn.k_proj.bias', 'layers.0.self_attn.v_proj.bias']"],
    ),
    "o_proj bias": (
        LLAMA,
        lambda: {**eagle1_tensors(), "layers.0.self_attn.o_proj.bias": noise(32, seed=0)},
        ["unexpected ['layers.0.self_attn.o_proj.bias']"],
    ),
    "not finite": (
        LLAMA,
        lambda: {**eagle1_tensors(), "fc.weight": torch.full((HIDDEN, 2 * HIDDEN), float("nan"))},
        ["not finite", "fc.weight"],
    ),
    "twice": (
        LLAMA,
        lambda: {**eagle3_tensors(), **eagle3_tensors("layers.0")},
        ["twice", "midlayer.", "layers.0."],
    ),
    "bias said, not there": ({**LLAMA, "bias": True}, eagle1_tensors, ["bias=True", "no fc.bias"]),
    "bias there, denied": (
        {**LLAMA, "bias": False},
        lambda: eagle1_tensors(fc_bias=True),
        ["bias=False", "an fc.bias"],
    ),
    "another embedding": (
        LLAMA,
        lambda: {**eagle1_tensors(), "embed_tokens.weight": noise(VOCAB, HIDDEN, seed=9)},
        ["embed_tokens.weight: expected a copy of the target's"],
    ),
    "another head in EAGLE-1": (
        LLAMA,
        lambda: {**eagle1_tensors(), "lm_head.weight": noise(VOCAB, HIDDEN, seed=9)},
        ["lm_head.weight: expected a copy of the target's"],
    ),
    "d2t too large": (
        REDUCED,
        lambda: {**eagle3_tensors(draft_ids=DRAFT_IDS), "d2t": torch.tensor([0, 0, 0, 0, VOCAB - 4])},
        ["d2t is out of range in 1 of 5 rows", "from 0 to 127", "row 4: 128"],
    ),
    "d2t negative": (
        REDUCED,
        lambda: {**eagle3_tensors(draft_ids=DRAFT_IDS), "d2t": torch.tensor([-1, 0, 0, 0, 0])},
        ["d2t is out of range", "row 0: -1"],
    ),
    "d2t repeats": (
        REDUCED,
        lambda: {**eagle3_tensors(draft_ids=DRAFT_IDS), "d2t": torch.tensor([1, 0, 0, 0, 0])},
        ["d2t names 1 ids more than once"],
    ),
    "d2t of another length": (
        REDUCED,
        lambda: {**eagle3_tensors(draft_ids=DRAFT_IDS), "d2t": torch.zeros(4, dtype=torch.int64)},
        ["d2t: expected shape [5], found [4]"],
    ),
    "d2t of floats": (
        REDUCED,
        lambda: {**eagle3_tensors(draft_ids=DRAFT_IDS), "d2t": torch.zeros(5)},
        ["d2t: expected dtype int64, found float32"],
    ),
    "t2d of other ids": (
        REDUCED,
        lambda: {**eagle3_tensors(draft_ids=DRAFT_IDS), "t2d": torch.ones(VOCAB, dtype=torch.bool)},
        ["t2d marks 128 ids, not the 5 of d2t"],
    ),
    "d2t missing": (REDUCED, lambda: without(eagle3_tensors(draft_ids=DRAFT_IDS), "d2t"), ["missing ['d2t']"]),
    "head missing": (
        REDUCED,
        lambda: without(eagle3_tensors(draft_ids=DRAFT_IDS), "lm_head.weight"),
        ["missing ['lm_head.weight']", "draft_vocab_size=5"],
    ),
    "head of another size": (
        {**LLAMA, "draft_vocab_size": 7},
        lambda: eagle3_tensors(draft_ids=DRAFT_IDS),
        ["lm_head.weight: expected 7 rows (draft_vocab_size), found 5"],
    ),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors(case, target, tmp_path):
    config, make_tensors, parts = TENSOR_CASES[case]
    refuse(write(tmp_path / "bad", config, make_tensors()), target, *parts)


CONFIG_CASES = {
    "another target": (
        {"vocab_size": 64, "hidden_size": 16},
        ["vocab_size: expected 128 (the target's), found 64", "hidden_size: expected 32 (the target's), found 16"],
    ),
    "a CORAL folder": ({"model_type": "coral"}, ["CORAL drafter already", "AutoModel.from_pretrained"]),
    "unknown speculator": ({"speculators_model_type": "dflash"}, ["speculators_model_type: expected 'eagle3'"]),
    "norms of another kind": ({"model_type": "gemma3_text"}, ["model_type 'gemma3_text'"]),
    "several layers": (
        {"num_hidden_layers": 2, "architectures": ["MedusaModel"]},
        ["num_hidden_layers: expected 1, found 2", "MedusaModel"],
    ),
    "other target width": ({"target_hidden_size": 64}, ["target_hidden_size: expected 32, found 64"]),
    "norm before fc in EAGLE-1": (
        {"eagle_config": {"norm_before_fc": True}},
        ["norm_before_fc=True", "shape='eagle'"],
    ),
    "norm of the wrong type": ({"eagle_config": {"fc_norm": "yes"}}, ["fc_norm: expected boolean, found 'yes'"]),
    "other norms": ({"add_para_norm": True, "mlp_bias": True}, ["add_para_norm", "mlp_bias"]),
    "no sizes": ({"intermediate_size": None, "vocab_size": None}, ["['vocab_size', 'intermediate_size']"]),
    "size of the wrong type": (
        {"hidden_size": "wide", "rope_theta": [1]},
        ["hidden_size: expected integer, found 'wide'"],
    ),
    "malformed parts": ({"eagle_config": [], "coral_config": 3}, ["coral_config: expected object, found 3"]),
    "RoPE keys disagree": (
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        ["rope_theta=500.0", "disagree"],
    ),
    "partial RoPE": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_config(case, target, tmp_path):
    keys, parts = CONFIG_CASES[case]
    refuse(write(tmp_path / "bad", {**LLAMA, **keys}, eagle1_tensors()), target, *parts)


def test_unnamed_feature_layers(target, tmp_path):
    path = write(tmp_path / "bad", LLAMA, eagle3_tensors(features=2))
    refuse(path, target, "2 target features", "target_feature_layers")
    assert CoralDraftModel.from_eagle(path, target, target_feature_layers=[1, 3]).config.num_target_features == 2
    path = write(tmp_path / "deep", {**LLAMA, "eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, eagle3_tensors())
    refuse(path, target, "[1, 2, 9]", "the target has 4 layers")
    path = write(
        tmp_path / "text", {**LLAMA, "eagle_config": {"eagle_aux_hidden_state_layer_ids": "012"}}, eagle3_tensors()
    )
    refuse(path, target, "expected a list of integers, found '012'")


class Exploit:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["pytorch_model.bin", "hot_token_ids.pt"])
def test_pickles_with_code(place, protocol, target, tmp_path):
    path = write(tmp_path / "bad", {**LLAMA, "coral_config": {}}, eagle1_tensors())
    if place == "pytorch_model.bin":
        (path / "model.safetensors").unlink()
    contents = {"fc.weight": Exploit(tmp_path / "owned")}
    torch.save(contents, path / place, pickle_protocol=protocol)
    refuse(path, target, place, "would run code")
    (path / place).write_bytes(pickle.dumps(contents, protocol=protocol))
    refuse(path, target, place)
    assert not (tmp_path / "owned").exists()


def test_damaged_files(target, tmp_path):
    tensors = eagle1_tensors()
    for layout, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        path = write(tmp_path / layout, LLAMA, tensors, layout)
        contents = (path / name).read_bytes()
        (path / name).write_bytes(contents[: len(contents) // 2])
        refuse(path, target, name)
        (path / name).write_bytes(b"")
        refuse(path, target, name)
    path = write(tmp_path / "list", LLAMA, {}, "bin")
    torch.save([1, 2], path / "pytorch_model.bin")
    refuse(path, target, "found list")
    torch.save({"fc.weight": 3}, path / "pytorch_model.bin")
    refuse(path, target, "non-tensors under ['fc.weight']")


def test_shards_and_index_differ(target, tmp_path):
    tensors = eagle1_tensors()
    path = write(tmp_path / "bad", LLAMA, tensors, "sharded safetensors")
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for change, part in (
        ({"fc.bias": index["weight_map"]["fc.weight"]}, "missing ['fc.bias']"),
        ({"fc.bias": "model-00003-of-00002.safetensors"}, "lacks the shards ['model-00003-of-00002.safetensors']"),
        ({"fc.bias": "../model.safetensors"}, "names shards outside its folder"),
    ):
        index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        refuse(path, target, part)
    index_file.write_text(json.dumps({"weight_map": without(index["weight_map"], "fc.weight")}))
    refuse(path, target, "not in the index ['fc.weight']")
    for text, message in (("[]", "must contain a JSON object"), ('{"metadata": {}}', "contains no weight_map")):
        index_file.write_text(text)
        refuse(path, target, message)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bytes_flipped_in_a_pickle(zipped, tmp_path):
    """Whatever torch's reader does, there is one error, which names the file; some flips only change values."""
    path, rng = tmp_path / "pytorch_model.bin", random.Random(0)
    state = {"fc.weight": torch.arange(6.0).view(2, 3), "norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.choice([len(whole), len(whole), rng.randrange(len(whole))])])
        try:
            assert all(isinstance(name, str) for name in read_weight_file(path))
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error)
            refused += 1
    assert refused > 100


def test_folders(target, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", target, "contains no config.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    refuse(tmp_path / "empty", target, "not valid JSON")
    (tmp_path / "empty" / "config.json").write_text("[]")
    refuse(tmp_path / "empty", target, "must contain a JSON object")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(LLAMA))
    refuse(tmp_path / "empty", target, "contains no weights", "model.safetensors")
    with pytest.raises(OSError, match=r"is not a folder; give one with a config\.json"):
        CoralDraftModel.from_eagle(tmp_path / "absent", target)
    with pytest.raises(OSError, match="not a local folder"):
        CoralDraftModel.from_eagle("nobody/no-such-drafter", target)
    path = write(tmp_path / "good", LLAMA, eagle1_tensors())
    with pytest.raises(ValueError, match="exists already"):
        import_checkpoint("eagle", str(path), path, target)


def test_hot_tokens_are_checked(target, tmp_path):
    path = write(tmp_path / "bad", {**LLAMA, "coral_config": {}}, eagle1_tensors())
    for ids in ([VOCAB], [-1], [], [[1]], [1, 1], "text", [1.5]):
        torch.save(ids, path / "hot_token_ids.pt")
        refuse(path, target, "hot_token_ids.pt")


def test_unknown_setting(target, tmp_path):
    path = write(tmp_path / "eagle", LLAMA, eagle1_tensors())
    with pytest.raises(ValueError, match="Unknown setting"):
        CoralDraftModel.from_eagle(path, target, draft_width=3)
    kept = {"draft_depth": 0, "unknown": 1}
    refuse(write(tmp_path / "kept", {**LLAMA, "coral_config": kept}, eagle1_tensors()), target, "draft_depth=0")
