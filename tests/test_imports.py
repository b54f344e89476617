"""Imports run one way, and importing the package does nothing but register."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_drafter
from transformers import GenerationMixin

import coral_hf
from coral_hf.generation import hook
from coral_hf.training.adapters import add_adapters
from coral_hf.training.curves import draw_learning_curve
from coral_hf.training.data import read_rows
from coral_hf.training.response_files import write_shards


PACKAGE = Path(coral_hf.__file__).parent
# module or room -> rooms it may import from (see CONTRIBUTING, "Which way imports run")
ALLOWED = {
    "configuration_checks": set(),
    "configuration_from_target": {"origin"},
    "configuration_coral": {"configuration_checks", "configuration_from_target", "weight_files"},
    "chat": set(),
    "code_version": set(),
    "compat": set(),
    "few_rows": set(),
    "hardware": set(),
    "origin": set(),
    "jsonl": set(),
    "prompt_rows": {"chat"},
    "user_cache": set(),
    "target_adapter": set(),
    "draft_initialization": {"configuration_coral", "target_adapter"},
    "grouped_head": {"few_rows"},
    "lm_head_router": {"configuration_coral", "few_rows", "grouped_head"},
    "rollout_attention": set(),
    "draft_layer": {"configuration_coral", "rollout_attention"},
    "weight_files": {"origin"},
    "modeling_coral": {"configuration_coral", "lm_head_router", "draft_layer", "draft_initialization", "weight_files"},
    "generation": {
        "compat",
        "configuration_coral",
        "few_rows",
        "grouped_head",
        "hardware",
        "lm_head_router",
        "draft_layer",
        "modeling_coral",
        "target_adapter",
        "user_cache",
    },
    "training": {
        "chat",
        "code_version",
        "compat",
        "configuration_coral",
        "hardware",
        "origin",
        "lm_head_router",
        "modeling_coral",
        "target_adapter",
        "weight_files",
        "jsonl",
        "prompt_rows",
        "hub",
    },
    "evaluation": {
        "chat",
        "code_version",
        "configuration_coral",
        "hardware",
        "origin",
        "lm_head_router",
        "modeling_coral",
        "target_adapter",
        "generation",
        "demo",
        "jsonl",
        "prompt_rows",
        "weight_files",
    },
    "hub": {"configuration_coral", "modeling_coral", "weight_files", "jsonl", "origin"},
    "demo": {"hardware", "modeling_coral", "user_cache"},
    "conversion": {"configuration_coral", "target_adapter", "jsonl", "weight_files"},
}
# tensors only: no model in here
MODEL_FREE = {"generation/draft_tree.py", "generation/tuning.py", "generation/verification.py", "training/losses.py"}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports, from its relative imports."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = parts[: len(parts) - node.level]
        names = [(node.module or "").split(".")[0]] if node.module else [alias.name for alias in node.names]
        rooms |= {base[0] if base else name for name in names}
    return rooms


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in ("__init__", "cli", "commands"):
            continue
        forbidden = imported_rooms(path) - ALLOWED[room] - {room, "__version__"}
        assert not forbidden, f"{path.name} imports {forbidden}"


def test_tensor_modules_know_no_model():
    for name in MODEL_FREE:
        text = (PACKAGE / name).read_text()
        assert "transformers" not in text and "modeling" not in text.replace("modeling_", ""), name


def test_import_needs_no_extra():
    """Core dependencies are enough to import the package and its command line."""
    blocked = ["datasets", "peft", "evaluate", "matplotlib", "rich", "gguf", "pyarrow"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport coral_hf, coral_hf.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


# what is missing, what asks for it, and for what
NEEDED = [
    ("pyarrow", lambda folder: read_rows(folder / "rows.parquet"), r"Reading Parquet .*coral-hf\[train\]"),
    ("pyarrow", lambda folder: write_shards([], folder), r"Writing Parquet .*coral-hf\[train\]"),
    ("datasets", lambda folder: read_rows("org/rows"), r"Reading data sets .*coral-hf\[train\]"),
    ("peft", lambda folder: add_adapters(None, None, None), r"peft_config .*coral-hf\[train\]"),
    ("matplotlib.figure", lambda folder: draw_learning_curve([], folder), r"learning curve .*coral-hf\[eval\]"),
]


@pytest.mark.parametrize(
    ("module", "call", "message"), NEEDED, ids=[message.split(" .*")[0] for *_, message in NEEDED]
)
def test_a_missing_extra_is_named(module, call, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        call(tmp_path)


def test_hook_is_idempotent():
    before = GenerationMixin._assisted_decoding
    hook.install()
    assert GenerationMixin._assisted_decoding is before


def test_hook_leaves_an_unknown_transformers_alone(monkeypatch):
    def other(self, input_ids):
        pass

    monkeypatch.setattr(hook, "_problem", None)
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", other)
    hook.install()
    assert GenerationMixin._assisted_decoding is other
    with pytest.raises(RuntimeError, match=r"_assisted_decoding .* lacks .*'streamer'.* Install transformers>="):
        coral_hf.coral_generate(None, None)


def test_without_the_hook_the_remedy_is_named(target, prompt, monkeypatch):
    """Also where code asks whether there is a generation config, and where it wants another attribute."""
    for name in ("_assisted_decoding", "_get_candidate_generator", "_validate_generation_mode"):
        monkeypatch.setattr(GenerationMixin, name, getattr(getattr(GenerationMixin, name), hook._MARK))
    drafter = make_drafter(target)
    with pytest.raises(AttributeError, match="`import coral_hf` before generate"):
        target.generate(prompt, max_new_tokens=4, assistant_model=drafter)
    assert not hasattr(drafter, "generation_config") and getattr(drafter, "generation_config", 3) == 3
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        drafter.other  # noqa: B018


def test_coral_generate_takes_the_prompt_by_name():
    with pytest.raises(ValueError, match=r"tensor of shape \(1, 3\) as its drafter: .* input_ids="):
        coral_hf.coral_generate(None, torch.tensor([[1, 2, 3]]))
