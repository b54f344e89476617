"""Drafters that no engine supports, changes of an exported folder that its schema finds, and failed exports."""

import copy

import pytest
import torch
from helpers.engine_drafters import DRAFTERS, PAIRS, THREE, eight_layer_target, make, read
from helpers.tiny_models import make_drafter, make_target

from coral_hf import CoralDraftModel
from coral_hf.conversion import ENGINES, engine_export, export_drafter
from coral_hf.conversion.schema import check_export, load_schemas


REFUSED = [(name, engine) for name, (_, engines) in DRAFTERS.items() for engine in ENGINES if engine not in engines]
# what EAGLE's own code holds
DEFAULT_THREE = {**THREE, "norm_output": False}


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


@pytest.mark.parametrize(("name", "engine"), REFUSED)
def test_what_an_engine_lacks_is_refused(name, engine, target, tmp_path):
    with pytest.raises(ValueError, match=f"{engine} cannot express this drafter"):
        export_drafter(make(name, target), engine, tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "engine", "message"),
    [
        ({"shape": "eagle3", "target_feature_layers": [2, 4, -1]}, "vllm", r"\[2, 4, -1\]"),
        ({"shape": "eagle3", "target_feature_layers": [4, 2]}, "vllm", "ascending"),
        ({"shape": "eagle3", "target_feature_layers": [4]}, "vllm", "must be the last"),
        ({"shape": "eagle3", "target_feature_layers": [0, 4]}, "sglang", "layer 0"),
        ({"shape": "eagle3", "target_feature_layers": [1, 2, 3], "norm_output": False}, "eagle", r"\[2, 4, 5\]"),
        (
            {**DEFAULT_THREE, "norm_before_fc": True},
            "eagle",
            "norm_before_fc=True, .* use --to vllm, sglang or speculators",
        ),
        ({**DEFAULT_THREE, "fc_norm": True}, "eagle", "fc_norm=True, its fc reads features without a norm"),
        ({"shape": "eagle", "hidden_act": "gelu"}, "vllm", "gelu"),
        ({"shape": "eagle3", "attention_bias": True}, "vllm", "attention_bias"),
        ({"shape": "eagle", "target_embedding_scale": 8.0}, "sglang", "scales its embeddings"),
        ({"shape": "eagle"}, "tgi", "vllm"),
    ],
)
def test_refusals_say_why(settings, engine, message, target, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_drafter(make_drafter(target, **settings), engine, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_eagle3_head_needs_the_target(target, tmp_path):
    drafter = make("eagle3, pre-norm state fed back", target)
    with pytest.raises(ValueError, match="--target"):
        export_drafter(drafter, "eagle", tmp_path / "out")
    with pytest.raises(ValueError, match="num_hidden_layers"):
        export_drafter(drafter, "eagle", tmp_path / "out", target=make_target(dtype=torch.float32))
    assert not list(tmp_path.iterdir())


def test_folder_of_another_target(target, tmp_path):
    """An exported folder's statements about its target are checked when it is loaded again."""
    export_drafter(make("eagle", target), "vllm", tmp_path / "out")
    with pytest.raises(ValueError, match="num_hidden_layers=8"):
        CoralDraftModel.from_eagle(tmp_path / "out", make_target(dtype=torch.float32))


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_schema_catches_every_change(name, engine, target, tmp_path):
    """Each tensor left out, misshapen or cast, each norm dropped and each key of the schema changed is an error."""
    drafter = make(name, target)
    export_drafter(drafter, engine, tmp_path / "out", target=target)
    config, tensors = read(tmp_path / "out")
    schema = load_schemas()["engines"][engine][drafter.config.shape]
    optional = {key.format(layer=schema["layer"]) for key in schema["optional"]}
    for key, tensor in tensors.items():
        others = {other: value for other, value in tensors.items() if other != key}
        broken = [
            {**others, key: tensor[..., :-1]},
            {**others, key: tensor.double()},
            {**tensors, f"{key}_extra": tensor},
        ]
        for changed in broken if key in optional else [others, *broken]:
            with pytest.raises(ValueError, match=key):
                check_export(engine, drafter.config, config, changed)
    settings = load_schemas()["layouts"][drafter.config.shape].get("settings", {})
    for key in settings:
        changed = (
            {**config, key: True} if key not in config else {name: config[name] for name in config if name != key}
        )
        for wrong in (changed, {**config, key: False}):
            with pytest.raises(ValueError, match=key):
                check_export(engine, drafter.config, wrong, tensors)
    for key, rule in schema["config"].items():
        changed = copy.deepcopy(config)
        changed[key] = object() if rule != "absent" else True
        with pytest.raises(ValueError, match=key):
            check_export(engine, drafter.config, changed, tensors)


def test_nothing_half_written(target, tmp_path, monkeypatch):
    drafter = make("eagle", target)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(engine_export, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export_drafter(drafter, "vllm", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_drafter(drafter, "vllm", tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("family", "message"), [("gemma3_text", "by 5.65"), ("granite", "by 3"), ("qwen3", None), ("llama", None)]
)
def test_scaled_embeddings(family, message, tmp_path):
    """A drafter records its target's scale; otherwise it is taken from the target, or from the target's type."""
    drafter = make_drafter(make_target(family, dtype=torch.float32), shape="eagle")
    old = copy.deepcopy(drafter)
    old.config.target_embedding_scale = None
    config = make_target(family, dtype=torch.float32).config
    by_type = {"granite": "give the target's path", "gemma3_text": "by 48"}.get(family)
    for name, args, expected in (
        ("recorded", (drafter, None), message),
        ("target", (old, engine_export.meta_target(config)), message),
        ("type", (old, None), by_type),
    ):
        if expected is None:
            export_drafter(args[0], "vllm", tmp_path / name, target=args[1])
        else:
            with pytest.raises(ValueError, match=expected):
                export_drafter(args[0], "vllm", tmp_path / name, target=args[1])
