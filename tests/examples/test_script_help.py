"""Every script describes its purpose without loading a model."""

import runpy
import sys

import pytest
from helpers.scripts import ROOT


SCRIPTS = [
    path
    for folder in ("examples", "benchmarks", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_help_prints_the_docstring(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    docstring = script.read_text().split('"""')[1].replace("\\\n", "")
    assert " ".join(docstring.split()) in " ".join(capsys.readouterr().out.split())
