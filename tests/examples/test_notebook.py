"""The notebook runs from top to bottom on the demo pair, as a reader runs it."""

import json
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.real_model
def test_notebook_runs_from_top_to_bottom(capsys):
    """Its cells are plain Python: they run in one namespace, without a kernel."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "figures of one machine are not committed"
    namespace: dict = {}
    for number, source in enumerate(code):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
    assert "tokens per pass" in capsys.readouterr().out
