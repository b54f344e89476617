"""Every saved folder loads from any place; `coral-hf push` lists what it sends; an old Transformers is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import TOKEN
from helpers.tiny_models import make_drafter, make_target
from helpers.tiny_trainings import make_trainer

from coral_hf import CoralDraftModel
from coral_hf.cli import main
from coral_hf.hub.publish import AUTO_MAP


# In a process without the package: its name is blocked, as if it were not installed.
LOAD = """
import sys
sys.modules["coral_hf"] = None
from transformers import AutoModel
drafter = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
drafter.save_pretrained(sys.argv[2])
print(type(drafter).__module__.startswith("transformers_modules"), sum(p.numel() for p in drafter.parameters()))
"""


def saved(folder: Path, how: str) -> CoralDraftModel:
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, target_name_or_path="org/target")
    if how == "drafter":
        drafter.save_pretrained(folder)
    else:
        trainer = make_trainer(folder, target, drafter, max_steps=1)
        trainer.train()
        trainer.save_model()
    return drafter


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drafter", "trainer"])
def test_a_saved_folder_loads_without_the_package(how, tmp_path):
    drafter = saved(tmp_path / "saved", how)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    run = [sys.executable, "-c", LOAD, str(tmp_path / "saved"), str(tmp_path / "again")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", str(sum(p.numel() for p in drafter.parameters()))]
    assert (tmp_path / "again" / "modeling_coral.py").exists()  # and a drafter saved from there loads as well
    assert CoralDraftModel.from_pretrained(tmp_path / "again").config.auto_map


@pytest.mark.slow
def test_without_the_package_the_message_speaks_of_custom_code(tmp_path):
    saved(tmp_path / "saved", "drafter")
    code = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    run = [sys.executable, "-c", code, str(tmp_path / "saved")]
    done = subprocess.run(
        run, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL, env=environment(tmp_path)
    )
    assert done.returncode and "trust_remote_code=True" in done.stderr


def test_a_dry_run_writes_what_a_push_sends(folder, hub, tmp_path, capsys, monkeypatch):
    (folder / "training_args.bin").write_bytes(b"not for others")
    command = ["push", str(folder), "org/name", "--license", "apache-2.0"]
    assert main([*command, "--dry-run", str(tmp_path / "dry")]) == 0
    told = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'dry'}" in told and "model.safetensors" in told
    assert main([*command, "--dry-run", str(tmp_path / "dry")]) == 2
    assert "exists already; name a new or an empty folder" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(command) == 0
    dry = {str(path.relative_to(tmp_path / "dry")) for path in (tmp_path / "dry").rglob("*") if path.is_file()}
    assert dry == {name for name in hub.files("org/name") if name != ".gitattributes"}
    assert "training_args.bin" not in dry and "license: apache-2.0" in (tmp_path / "dry" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "org/name"], "nowhere is not a folder here"),
        ([".", "org/name/more"], "Repo id must be in the form"),
        (["."], "give repo_id"),
    ],
)
def test_push_refuses_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_old_transformers_is_named(tmp_path):
    """A release that lacks what the package imports, as 4.57 does."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("class AutoConfig: ...\nclass AutoModel: ...\n")
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n"
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text(metadata)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import coral_hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: coral_hf needs transformers>=5.17, found 4.57.1: pip install -U 'transformers>=5.17'."
