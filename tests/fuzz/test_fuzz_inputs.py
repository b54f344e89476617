"""A slice of `fuzz_inputs.py`, and the faults that its thousand cases found, one by one."""

import gzip
import json

import fuzz_inputs
import pytest
import torch
from helpers.tiny_models import make_drafter, make_target

from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.utils import jsonl
from coral_hf.utils.jsonl import read_json, read_jsonl


@pytest.mark.slow
def test_corrupted_inputs():
    total = fuzz_inputs.run(seed=1, start=0, count=120)
    assert total["faults"] == 0  # each was printed with the command that shows it alone
    assert total["refused"] > 60


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, '{"a": 1', "\ufeff{}", "[1]"])
def test_json_that_is_none(text, tmp_path):
    """Nested beyond Python's stack, numbers beyond its limit: the errors are not `JSONDecodeError`."""
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json"):
        read_json(path)
    with pytest.raises(ValueError, match=r"record\.json, line 1"):
        list(read_jsonl(path))


def test_damaged_gzip_and_a_line_that_fills_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    data = bytearray(gzip.compress(json.dumps({"turns": ["word"] * 500}).encode()))
    data[14:20] = b"\xff" * 6
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cut off, or its content does not match its name"):
        list(read_jsonl(path))
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1000)
    path.write_bytes(gzip.compress(b'{"id": "' + b"x" * 10**6 + b'"}'))
    with pytest.raises(ValueError, match="line 1: longer than 1,000"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", 2.5),
        ("hidden_size", 10**30),
        ("draft_depth", True),
        ("rms_norm_eps", float("nan")),
        ("rope_parameters", {"rope_theta": "10000"}),
        ("target_feature_layers", ["-1"]),
        ("router_groups", None),
        ("hidden_act", ["silu"]),
    ],
)
def test_config_values_of_another_type(name, value):
    with pytest.raises(ValueError, match=name):
        CoralDraftConfig(**{name: value})


@pytest.mark.parametrize("place", [0, 8, 60])
def test_damaged_weights(place, tmp_path):
    make_drafter(make_target(dtype=torch.float32)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] = 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        CoralDraftModel.from_pretrained(tmp_path)


def test_a_config_of_other_sizes(tmp_path):
    """The error names the tensors; the options of `from_pretrained` still work."""
    make_drafter(make_target(dtype=torch.float32)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "intermediate_size": 65}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit config\.json.*down_proj\.weight is \[32, "):
        CoralDraftModel.from_pretrained(tmp_path)
    drafter, info = CoralDraftModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert drafter.config.intermediate_size == 65 and len(info["mismatched_keys"]) == 3
    path.unlink()
    with pytest.raises(ValueError, match=r"contains no config\.json"):
        CoralDraftModel.from_pretrained(tmp_path)
