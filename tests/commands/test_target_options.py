"""`--target_revision`, `--trust_remote_code` and `--device_map`: loading, the record, and the refusals."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from transformers import AutoModelForCausalLM

from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.cli import main
from coral_hf.commands.loading import load_target, load_target_ends, resolve_device_map
from coral_hf.training.run.run_folder import PROGRESS_FILE


def save_pair(folder: Path, seed: int = 0) -> None:
    """A tiny target with its tokenizer in `folder/target`; its drafter and prompts in `folder`."""
    target = make_target(dtype=torch.float32, seed=seed)
    target.save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_drafter(target).save_pretrained(folder / "drafter")
    rows = [{"id": f"p{index}", "turns": [f"w{index} w"]} for index in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def revisions(hub, tmp_path, monkeypatch):
    """`org/target` with other weights on its branches `main` and `v2`: their commits."""
    commits = {}
    for seed, branch in enumerate(("main", "v2")):
        save_pair(tmp_path / branch, seed)
        files = {path.name: path.read_bytes() for path in (tmp_path / branch / "target").iterdir()}
        commits[branch] = hub.commit("org/target", files, branch)
    monkeypatch.chdir(tmp_path / "v2")
    return commits


VERIFY = ["verify", "--drafter", "drafter", "--data", "prompts.jsonl", "--max-new-tokens", "4", "--limit", "1"]
REGENERATE = ["regenerate", "--target", "org/target", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
TRAIN = ["train", "--data", "rows.jsonl", "--dtype", "float32", "--report_to", "none", "--eval_rows", "0"]
TRAIN_ON = [*TRAIN, "--target", "org/target", "--output_dir", "out", "--save_steps", "1"]


def rows_to_train_on(folder: Path) -> None:
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + index]} for index in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "verb",
    [
        ["verify", "--data", "prompts.jsonl"],
        ["benchmark", "--output", "out"],
        ["tune", "--data", "prompts.jsonl", "--output", "out"],
        ["regenerate", "--prompts", "prompts.jsonl", "--output", "out.jsonl"],
        ["train", "--data", "rows.jsonl", "--output_dir", "out"],
        ["convert", "--from", "eagle", "in", "out"],
        ["convert", "--to", "vllm", "demo", "out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_the_demo_target_takes_none_of_them(verb, folder, capsys):
    given = [["--target-revision", "v2"], ["--trust_remote_code", "true"]]
    if verb[0] not in ("train", "convert"):
        given.append(["--device-map", "auto"])
    for options in given:
        assert main([*verb, *options]) == 2
        error = capsys.readouterr().err.strip()
        value = "True" if options[1] == "true" else options[1]
        assert f"{options[0].replace('-', '_').replace('__', '--')} {value} is for a target in a folder" in error
        assert "name another target with --target, or leave" in error and "\n" not in error
    assert not (folder / "out").exists() and not (folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*VERIFY, "--target", "target", "--target_revision", "v2"], "--target target is a folder, which has no revisions"),
        ([*VERIFY, "--target", "target", "--device_map", "auto", "--device", "cpu"], "--device cpu both place the target"),
        ([*VERIFY, "--target", "target", "--device_map", "everywhere"], "--device_map 'everywhere' cannot be used here"),
        ([*VERIFY, "--target", "target", "--device_map", '{"": "everywhere"}'], "--device_map 'everywhere' cannot be used"),
        ([*VERIFY, "--target", "target", "--device_map", '{"model": "there"}'], "--device_map 'there' cannot be used here"),
        ([*VERIFY, "--target", "target", "--device_map", "meta"], "--device_map 'meta' cannot be used here"),
        ([*VERIFY, "--target", "target", "--device_map", "{}"], 'each module needs a device, for example 0 or "cpu"'),
        ([*VERIFY, "--target", "target", "--device_map", '{"model": '], "is not a JSON object"),
        ([*VERIFY, "--target", "target", "--device_map", '{"model": [0]}'], 'each module needs a device, for example 0 or "cpu"'),
        (["train", "--data", "x", "--output_dir", "out", "--device_map", "auto"], "splits a larger target over several"),
        (["demo", "--target_revision", "v2"], "demo only runs the shipped pair"),
        (["demo", "--device-map=auto"], "demo only runs the shipped pair"),
        (["convert", "--to", "vllm", "drafter", "out", "--target", "t", "--target_revision", "v2"], "this export loads none"),
        (
            [*REGENERATE, "--endpoint", "http://localhost:1/v1", "--endpoint_model", "m", "--target_revision", "v2"],
            "--target_revision v2 is for --target, but --endpoint http://localhost:1/v1 answers",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(arguments, message, folder, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]  # before it, the bars of a drafter being loaded


def test_device_maps():
    assert resolve_device_map("auto") == "auto" and resolve_device_map("cpu") == {"": "cpu"}
    assert resolve_device_map('{"model": "disk", "lm_head": "cpu"}') == {"model": "disk", "lm_head": "cpu"}


WHOLE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
LAYERS = [f"model.layers.{index}" for index in range(4)]
ON_CPU = json.dumps({**WHOLE, **dict.fromkeys(LAYERS, "cpu")})
SPREAD = json.dumps({**WHOLE, **dict.fromkeys(LAYERS, "cpu"), "model.layers.2": "disk"})


@pytest.mark.parametrize("places", ["auto", "sequential", "cpu", ON_CPU, SPREAD])
def test_a_device_map_generates_the_same(places, folder, monkeypatch, capsys):
    maps = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        maps.append(kwargs.get("device_map"))
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    target, _ = load_target("target", "float32", device_map=places)
    plain, _ = load_target("target", "float32", "cpu")
    assert maps == [resolve_device_map(places), None]
    if places == SPREAD:  # else all lies in one place, where Transformers keeps no map
        assert set(target.hf_device_map.values()) == {"cpu", "disk"}
        assert {parameter.device.type for parameter in target.model.layers[2].parameters()} == {"meta"}
    else:
        assert len({parameter.device for parameter in target.parameters()}) == 1
    ids = torch.tensor([[20, 30, 40]])
    answers = [model.generate(ids.to(model.device), max_new_tokens=8, do_sample=False) for model in (target, plain)]
    assert torch.equal(answers[0].cpu(), answers[1])
    assert main([*VERIFY, "--target", "target", "--device-map", places]) == 0
    arguments = ["regenerate", "--target", "target", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    capsys.readouterr()
    status = main([*arguments, "--max-new-tokens", "4", "--slots", "2", "--device_map", places])
    if places == SPREAD:
        assert status == 2 and "The target lies on several devices (cpu, disk)" in capsys.readouterr().err
    else:
        assert status == 0 and len(Path("out.jsonl").read_text().splitlines()) == 3
    assert maps[2:] == [resolve_device_map(places)] * 2


def test_parts_that_a_step_reads_need_a_device(folder, capsys):
    for places, message in (
        ({"model": "cpu", "lm_head": "disk"}, "leaves the target's LM head without a device"),
        (
            {**json.loads(ON_CPU), "modl": "cpu"},
            "names modl, which this target does not have; its parts are model, lm_head",
        ),
    ):
        assert main([*VERIFY, "--target", "target", "--device_map", json.dumps(places)]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_revision_is_loaded_and_recorded(revisions, tmp_path, capsys):
    arguments = [*VERIFY, "--output", "records", "--target", "org/target", "--target_revision", "v2"]
    assert main(arguments) == 0
    record = json.loads(Path("records/check_coral.json").read_text())
    assert (record["target"], record["target_revision"]) == ("org/target", revisions["v2"])
    plain = {branch: load_target("org/target", "float32", "cpu", revision=branch)[0] for branch in revisions}
    assert not torch.equal(*(target.lm_head.weight for target in plain.values()))
    ends = load_target_ends("org/target", "float32", revision="v2")
    assert torch.equal(ends.lm_head.weight, plain["v2"].lm_head.weight)
    assert ends.config._commit_hash == revisions["v2"]
    assert main([*arguments[:-1], "v3"]) == 2
    assert "under that id at --target_revision v3" in capsys.readouterr().err
    rows_to_train_on(Path())
    train = [*TRAIN, "--target", "org/target", "--max_steps", "1"]
    for drafter, branch in (
        ([], "v2"),
        (["--drafter", "out-v2"], "main"),
    ):  # one that continues is trained for it from now on
        assert main([*train, *drafter, "--target-revision", branch, "--output_dir", f"out-{branch}"]) == 0
        config = CoralDraftConfig.from_pretrained(f"out-{branch}")
        assert (config.target_name_or_path, config.target_revision) == ("org/target", revisions[branch])


@pytest.mark.slow
def test_what_is_continued_notices_another_revision(revisions, capsys):
    rows_to_train_on(Path())
    train = [*TRAIN_ON, "--cache_features", "features"]
    assert main([*train, "--max_steps", "1", "--target_revision", "v2"]) == 0
    capsys.readouterr()
    assert main([*train, "--max_steps", "2", "--overwrite", "true"]) == 2
    assert f"contains features of {{'target': 'org/target {revisions['v2']}'" in capsys.readouterr().err
    resumed = [*TRAIN_ON, "--max_steps", "2", "--resume_from_checkpoint", "last"]
    assert main(resumed) == 2
    assert f"Resume with the earlier target (--target_revision {revisions['v2']})" in capsys.readouterr().err
    assert main([*resumed, "--target_revision", revisions["v2"]]) == 0
    arguments = [*REGENERATE, "--max-new-tokens", "4", "--slots", "2", "--dtype", "float32"]
    assert main([*arguments, "--target_revision", "v2"]) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert {row["target_revision"] for row in rows} == {revisions["v2"]}
    capsys.readouterr()
    assert main(arguments) == 2
    assert f"continue with --target_revision {revisions['v2']}" in capsys.readouterr().err
    assert main([*arguments, "--target_revision", revisions["v2"]]) == 0


@pytest.mark.slow
def test_what_says_no_revision_is_continued(revisions):
    """Checkpoints, feature caches and response files of earlier versions, or of a target that was in a folder then."""
    rows_to_train_on(Path())
    train = [*TRAIN_ON, "--cache_features", "features"]
    assert main([*train, "--max_steps", "1", "--target_revision", "v2"]) == 0
    for path, key, value in (
        (Path("out/checkpoint-1") / PROGRESS_FILE, "target_revision", None),
        (Path("features/meta.json"), "target", "org/target None"),
    ):
        stored = json.loads(path.read_text())
        assert revisions["v2"] in stored.pop(key)
        path.write_text(json.dumps(stored | ({key: value} if value else {})))
    resumed = [*train, "--max_steps", "2", "--resume_from_checkpoint", "last", "--target_revision"]
    assert main([*resumed, "main"]) == 2  # the cache's weights differ
    assert main([*resumed, "v2"]) == 0
    assert json.loads((Path("out/checkpoint-2") / PROGRESS_FILE).read_text())["target_revision"] == revisions["v2"]
    arguments = [*REGENERATE, "--max-new-tokens", "4", "--slots", "2", "--dtype", "float32", "--target_revision", "v2"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert rows[0].pop("target_revision") == revisions["v2"]
    Path("out.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(arguments) == 0
    again = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert again[0] == rows[0] and sorted(row["id"] for row in again) == ["p0", "p1", "p2"]
    assert [row.get("target_revision") for row in again] == [None, *[revisions["v2"]] * 2]
    train = [*TRAIN, "--data", "out.jsonl", "--target", "org/target", "--output_dir", "out2", "--max_steps", "1"]
    assert main(train) == 0


CONFIGURATION = """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny_of_its_own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def test_code_of_a_repository_runs_only_where_it_is_trusted(folder, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    (folder / "target" / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "target" / "modeling_tiny.py").write_text(MODELING)
    config = json.loads((folder / "target" / "config.json").read_text())
    code = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config |= {"model_type": "tiny_of_its_own", "auto_map": code, "architectures": ["TinyForCausalLM"]}
    (folder / "target" / "config.json").write_text(json.dumps(config))
    rows_to_train_on(folder)
    arguments = [*TRAIN, "--target", "target", "--output_dir", "out", "--max_steps", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "--target target needs Python code" in error and "--trust_remote_code true" in error and "\n" not in error
    assert not (folder / "modules").exists()
    assert main([*arguments, "--trust-remote-code", "true"]) == 0
    assert CoralDraftModel.from_pretrained("out").config.target_model_type == "tiny_of_its_own"
    verify = ["verify", "--target", "target", "--drafter", "out", "--data", "prompts.jsonl", "--max-new-tokens", "4"]
    assert main([*verify, "--trust_remote_code"]) == 0
