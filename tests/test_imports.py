"""Imports run one way, and importing the package does nothing but register."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target
from transformers import GenerationMixin

import coral_hf
from coral_hf.data.dataset import read_rows
from coral_hf.generation import hook
from coral_hf.hub.publish import prepare_folder
from coral_hf.responses.response_files import write_shards
from coral_hf.training.report.learning_curve import draw_learning_curve
from coral_hf.training.run.adapters import add_adapters


PACKAGE = Path(coral_hf.__file__).parent
# The floors of the house: room -> rooms it may import from (see CONTRIBUTING, "Which way imports run").
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "drafter": set(),
    "data": {"utils", "drafter"},
    "demo": {"utils", "drafter"},
    "generation": {"utils", "drafter"},
    "responses": {"utils", "drafter", "data", "generation"},
    "evaluation": {"utils", "drafter", "data", "generation", "demo"},
    "conversion": {"utils", "drafter"},
    "hub": {"utils", "drafter"},
    "training": {"utils", "drafter", "data", "generation", "responses", "hub"},
    "commands": {
        "utils",
        "drafter",
        "data",
        "demo",
        "generation",
        "responses",
        "evaluation",
        "conversion",
        "hub",
        "training",
    },
    "cli": {"utils", "commands", "training"},
    "__init__": {"utils", "drafter", "generation", "conversion", "hub"},
}
# tensors only: no model in here
MODEL_FREE = {
    "generation/draft_tree.py",
    "generation/tree_size.py",
    "generation/acceptance.py",
    *(f"training/losses/{path.name}" for path in (PACKAGE / "training/losses").glob("*.py")),
}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, dotted, the package's name left out: by statement or by name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            absolute = (node.module or "").split(".")
            if not node.level and absolute[0] != "coral_hf":
                continue
            base = (*parts[: len(parts) - node.level], *absolute) if node.level else absolute[1:]
            base = tuple(part for part in base if part)
            for alias in node.names:
                name = (*base, alias.name)
                found.add(".".join(name if is_module(name) else base))
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("coral_hf")}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found.add(ast.literal_eval(node.args[0]).partition(".")[2])
    return found


def is_module(parts: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def carried(path: Path) -> bool:
    """A file that the package ships for other programs to load by its path: above all layers."""
    return "custom_generate" in path.parts or "metrics" in path.relative_to(PACKAGE).parts[:-1]


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        if carried(path):
            continue
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        rooms = {module.split(".")[0] for module in imported_modules(path)}
        assert not rooms - ALLOWED[room] - {room}, f"{path.relative_to(PACKAGE)} imports {rooms - ALLOWED[room]}"


def test_no_module_imports_itself_by_way_of_others():
    """Not within a function or by name either: code that two files both need is in a third."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        if not carried(path):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            graph[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imported_modules(path)
    while leaves := [module for module, imports in graph.items() if not imports & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"a circle among {sorted(graph)}"


def test_the_house_has_room():
    """The root shows at a glance what the package does, and every folder is small."""
    listed = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "model_cards")]
    assert len(listed) <= 13, sorted(path.name for path in listed)
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 16, f"{folder} contains {len(files)} files"
    for folder in ("coral_hf", "tests", "examples", "benchmarks", "scripts", "docs"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 350, path


def test_the_drafters_room_is_what_a_published_drafter_carries(tmp_path):
    make_drafter(make_target()).save_pretrained(tmp_path)
    prepare_folder(tmp_path, "org/name")
    room = {path.name: path.read_text() for path in (PACKAGE / "drafter").glob("*.py") if path.name != "__init__.py"}
    assert {path.name: path.read_text() for path in tmp_path.glob("*.py")} == room


def test_tensor_modules_know_no_model():
    for name in MODEL_FREE:
        text = (PACKAGE / name).read_text()
        assert "transformers" not in text and "modeling" not in text.replace("modeling_", ""), name


def test_import_needs_no_extra():
    """The core dependencies suffice to import the package and its command line."""
    blocked = ["datasets", "peft", "evaluate", "matplotlib", "rich", "gguf", "pyarrow"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport coral_hf, coral_hf.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


# the missing package, the call that needs it, and its purpose
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
    """Also for code that tests for a generation config, or reads another attribute."""
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
