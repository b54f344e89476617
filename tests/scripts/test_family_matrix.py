"""The table of supported models lists every family that the script tries, and says what the script finds."""

import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import family_matrix


def rows() -> dict[str, list[str]]:
    """Rows of the committed table, by family."""
    lines = family_matrix.PAGE.read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in table}


def test_every_family_is_in_the_table():
    table = rows()
    assert list(table) == list(family_matrix.ALL) and len(table) >= 60
    assert all(any(kind in row[1] for row in table.values()) for kind in ("MoE", "MLA", "sliding", "recurrent"))
    for name, row in table.items():
        assert len(row) == 5 and row[1] == (family_matrix.ALL[name].what or "-"), row
        assert {row[2], row[3]} <= {"yes", "no"} and (row[4] == "-") == (row[2] == row[3] == "yes"), row
        assert (row[2], row[3]) != ("yes", "no"), "a chain is a tree of width one"


def test_the_page_is_what_the_script_writes():
    assert (
        family_matrix.page(list(rows().values())).splitlines()[9:]
        == (family_matrix.PAGE.read_text(encoding="utf-8").splitlines()[9:])
    )


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mpt", "mamba"])
def test_some_families_are_as_the_table_says(name):
    assert family_matrix.cells(name, family_matrix.tried(name)) == rows()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(family_matrix.ALL))
def test_all_families_are_as_the_table_says(name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {name}")
    assert family_matrix.cells(name, family_matrix.tried(name)) == rows()[name]
