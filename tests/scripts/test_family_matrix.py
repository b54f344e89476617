"""The table of supported models lists every family that the script tries, and contains what the script finds."""

import sys
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import family_matrix
import run_matrix


RECORD = family_matrix.read_record()
NEWEST = RECORD[family_matrix.newest(RECORD)]
# the results of this Transformers version, or of the newest one on file
RESULTS = RECORD.get(transformers.__version__, NEWEST)


def test_every_family_is_in_the_record():
    assert list(NEWEST) == list(family_matrix.ALL) and len(NEWEST) >= 60
    special = {family.what for family in family_matrix.ALL.values()}
    assert all(any(kind in what for what in special) for kind in ("MoE", "MLA", "sliding", "recurrent"))
    for name, found in NEWEST.items():
        assert tuple(found) == family_matrix.COLUMNS, name
        assert found["sliding window"] in ("no", "some layers", "all layers"), name
        for kind in family_matrix.COLUMNS[1:]:
            assert found[kind] == "yes" or (found[kind].startswith("no: ") and len(found[kind]) > 20), (name, kind)
        assert (found["tree"], found["chain"][:2]) != ("yes", "no"), "a chain is a tree of width one"
        assert found["batch"] != "yes" or found["chain"] == "yes", "the store supports more than single sequences do"


def test_the_page_is_what_the_script_writes():
    assert family_matrix.PAGE.read_text(encoding="utf-8") == family_matrix.page(RECORD), "run scripts/family_matrix.py"


def test_the_lowest_supported_version_was_tried():
    """Its results are those of the newest, apart from what is listed here: a change of these is for the changelog."""
    floor = run_matrix.requirement("transformers", "floor").removeprefix("transformers==")
    (lowest,) = [version for version in RECORD if version == floor or version.startswith(f"{floor}.")]
    assert lowest == min(RECORD, key=family_matrix._parts)
    assert NEWEST.keys() - RECORD[lowest].keys() == {"lara_mini"}
    columns = [family_matrix.cells(name, RECORD)[-2] for name in NEWEST]
    span = f"{lowest} to {family_matrix.newest(RECORD)}"
    others = {name: column for name, column in zip(NEWEST, columns, strict=True) if column != span}
    assert others.keys() == {"lara_mini", "nemotron_h", "recurrent_gemma"}
    assert f"{lowest}: tree no, chain no" in others["nemotron_h"]


def test_versions_are_listed_with_what_differs():
    found = dict.fromkeys(family_matrix.COLUMNS, "yes") | {"sliding window": "no"}
    old = found | {"tree": "no: no positions", "batch": "no: no positions"}
    record = {"5.17.0": {"llama": old}, "5.9.1": {"llama": found}, "5.24.0": {"llama": found, "mpt": found}}
    assert family_matrix.newest(record) == "5.24.0"
    assert family_matrix.cells("llama", record)[-2] == "5.9.1, 5.24.0; 5.17.0: tree no, batch no"
    assert family_matrix.cells("mpt", record)[-2] == "5.24.0"
    record["5.17.0"]["llama"] = found
    assert family_matrix.cells("llama", record)[-2] == "5.9.1 to 5.24.0"
    assert family_matrix.counts(record) == {"families": 2, "tree": 2, "chain": 2, "batch": 2, "static store": 2}


@pytest.mark.parametrize("name", ["llama", "mpt", "mamba"])
def test_some_families_are_as_the_record_says(name):
    assert family_matrix.tried(name) == RESULTS[name]


# One of each kind for CI: MLA, two windows, MoE, sinks, a chunked window, recurrent layers
KINDS = ("deepseek_v3", "gemma3_text", "olmoe", "gpt_oss", "llama4_text", "falcon_h1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.exhaustive) for name in family_matrix.ALL]
)
def test_all_families_are_as_the_record_says(name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {name}")
    assert family_matrix.tried(name) == RESULTS[name]
