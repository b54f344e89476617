"""Every `>>>` of the package and the examples is Python that runs, and prints the lines below it."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers.chat_server import serve
from helpers.tiny_models import make_drafter

from coral_hf import demo


ROOT = Path(__file__).parent.parent
EXAMPLE_LINE = re.compile(r"^\s*>>> ", re.MULTILINE)
FILES = sorted(path for folder in ("coral_hf", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def examples_of(path: Path) -> list[doctest.DocTest]:
    """One test for each text of a file that contains examples: docstrings, and texts that `evaluate` turns into them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and EXAMPLE_LINE.search(node.value):
            text = inspect.cleandoc(node.value)
            found.append(doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), node.lineno - 1))
    return found


def failures(example: doctest.DocTest, names: dict) -> str:
    """The failures as doctest prints them; empty if there are none."""
    lines: list[str] = []
    example.globs = dict(names)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=lines.append)
    return "".join(lines)


@pytest.mark.parametrize(
    "example",
    [example for path in FILES for example in examples_of(path)],
    ids=lambda example: f"{example.name}:{example.lineno + 1}",
)
def test_example_runs(example, workplace, monkeypatch, request):
    """Examples import the names they use; models and prompts are the reader's, here tiny ones."""
    if "evaluate.load(" in example.docstring:
        request.getfixturevalue("modules_cache")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (workplace / "responses.jsonl").unlink()
    target, tokenizer = demo.load_target()
    names = {
        "target": target,
        "tokenizer": tokenizer,
        "drafter": make_drafter(target),
        "inputs": {"input_ids": torch.tensor([[5, 9, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)},
    }
    with serve() as server:
        for step in example.examples:
            step.source = step.source.replace("http://host:8000/v1", server.url)
        assert not (told := failures(example, names)), told


def test_no_example_is_overlooked():
    """Any line that begins like an example is one."""
    lines = {path: len(EXAMPLE_LINE.findall(path.read_text(encoding="utf-8"))) for path in FILES}
    found = {path: sum(len(text.examples) for text in examples_of(path)) for path in FILES}
    assert found == lines and sum(found.values()) > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('"""Adds.\n\n    >>> 1 + 1\n    3\n"""', "Expected:\n    3\nGot:\n    2"),
        ('def f():\n    """\n    >>> regenerate(target)\n    """', "NameError: name 'regenerate' is not defined"),
        ('HELP = """\n    >>> "a value that nobody wrote down"\n"""', "Expected nothing\nGot:\n    'a value"),
        ('"""\n>>> import coral_hf.no_such_module\n"""', "ModuleNotFoundError"),
    ],
)
def test_an_example_that_cannot_run_fails(source, message, tmp_path):
    (tmp_path / "module.py").write_text(source)
    (example,) = examples_of(tmp_path / "module.py")
    assert message in failures(example, {"target": None})
