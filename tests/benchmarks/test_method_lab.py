"""The method lab at tiny size: a target from the repository's text, every kind of recipe, runs that resume."""

import json

import pytest
import torch
from helpers.scripts import BENCHMARKS, refused, run


@pytest.fixture(autouse=True)
def lab_on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def toy(folder) -> list[str]:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 3,
        "target_tokens": 4096,
        "prompt_tokens": 8,
        "answer_tokens": 8,
        "answers": 12,
        "held_out_answers": 6,
        "tree_prompts": 3,
        "curve_rows": 4,
        "threads": 1,
    }
    return ["--output", str(folder), *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def common(tmp_path) -> list[str]:
    """Options of a lab with its own short text, so that its target takes a second."""
    text = tmp_path / "text.jsonl"
    words = ("the cat sat on the mat and", "a dog ran to the old house", "we eat bread with butter")
    rows = [{"text": f"{words[i % 3]} {i}. {words[(i + 1) % 3]} {i * i}. {words[i % 2]}."} for i in range(400)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    return [*toy(tmp_path / "lab"), "--text", str(text)]


def check_run(found: dict) -> None:
    tokens = [point["response_tokens"] for point in found["curve"]]
    assert tokens == sorted(tokens) and tokens[-1] <= found["response_tokens"]
    for temperature in ("temperature_0", "temperature_1"):
        part = found[temperature]
        assert 1 <= part["tau"] <= 6 and 1 <= part["tree_tau"] <= 6
        assert len(part["overlap"]) == 5 and all(0 < alpha < 1 for alpha in part["overlap"])
        assert len(part["agreement"]) == 5 and all(0 <= rate <= 1 for rate in part["agreement"])


@pytest.mark.slow
def test_the_lab_resumes(common, tmp_path, monkeypatch, capsys):
    file = tmp_path / "lab" / "method_lab.json"
    run(monkeypatch, "method_lab.py", *common, "--recipes", "hass3", "--seeds", "0")
    first = json.loads(file.read_text())
    run(monkeypatch, "method_lab.py", *common, "--recipes", "hass3", "csra_0.3", "--seeds", "0")
    record = json.loads(file.read_text())
    assert record["runs"][:1] == first["runs"], "finished runs are not repeated"
    assert [one["recipe"] for one in record["runs"]] == ["hass3", "csra_0.3"]
    for one in record["runs"]:
        check_run(one)
    summary = record["summary"]["csra_0.3"]["chain, temperature 0"]
    assert summary["seeds"] == 1 and summary["minus hass3"]["seeds"] == 1
    assert record["summary"]["hass3"]["chain, temperature 0"].keys() == {"mean", "interval", "seeds"}
    assert (tmp_path / "lab" / "method_lab.png").stat().st_size > 0
    assert "| csra_0.3 | 1 |" in capsys.readouterr().out
    with refused(capsys, "has runs with"):
        run(monkeypatch, "method_lab.py", *common, "--learning_rate", "1e-2")
    with refused(capsys, "contains a world with"):
        run(monkeypatch, "method_lab.py", *common, "--num_layers", "4")
    with refused(capsys, "the lab has eagle"):
        run(monkeypatch, "method_lab.py", *common, "--recipes", "eagle9")


# the shapes, a loss, CSRA, another optimizer
SOME = ["eagle", "csra_0.3", "lk_hybrid", "muon", "eagle_shape", "half_width"]


@pytest.mark.slow
@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_recipes_train(some, common, tmp_path, monkeypatch):
    from lab.recipes import RECIPES

    names = SOME if some else list(RECIPES)
    run(monkeypatch, "method_lab.py", *common, "--seeds", "3", "--recipes", *names)
    record = json.loads((tmp_path / "lab" / "method_lab.json").read_text())
    assert [one["recipe"] for one in record["runs"]] == names
    assert len({one["response_tokens"] for one in record["runs"]}) == 1
    for one in record["runs"]:
        check_run(one)


def test_the_repository_is_text_enough():
    from lab.text import documents, held_out

    found = documents([])
    assert found == documents([]) and len(found) > 500
    kept = [text for text in found if held_out(text)]
    assert 0.05 < len(kept) / len(found) < 0.2


def test_ids_need_their_tokenizer(tmp_path):
    from lab.text import documents

    (tmp_path / "rows.jsonl").write_text('{"prompt_ids": [1, 2], "response_ids": [3]}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1 contains ids.*--text_tokenizer"):
        documents([str(tmp_path / "rows.jsonl")])


def test_only_rows_of_a_kind(tmp_path):
    from lab.text import documents

    (tmp_path / "rows.jsonl").write_text('{"id": "a-1", "text": "one"}\n{"id": "b-1", "turns": ["two", "three"]}\n')
    assert documents([str(tmp_path / "rows.jsonl")], prefix="b") == ["two\nthree"]
    assert sorted(documents([str(tmp_path / "rows.jsonl")])) == ["one", "two\nthree"]


def test_a_summary_without_trees():
    from lab.summary import summarize, table

    def one(recipe, seed, overlap):
        part = {"tau": 1.5, "overlap": [overlap, overlap], "agreement": [0.5, 0.7]}
        return {"recipe": recipe, "seed": seed, "temperature_0": part, "temperature_1": part}

    runs = [one("hass3", 0, 0.4), one("hass3", 1, 0.5), one("tv", 0, 0.6), one("tv", 1, 0.7)]
    summary = summarize(runs)
    assert "tree, temperature 0" not in summary["tv"]
    gain = summary["tv"]["overlap, temperature 1"]["minus hass3"]
    assert gain == {"mean": 0.2, "interval": pytest.approx(0.0, abs=1e-3), "seeds": 2}
    assert table(summary).splitlines()[2].startswith("| tv | 2 | 1.500 ± 0.000 |")


def test_intervals_are_students():
    from lab.summary import interval

    # t = 4.303 for three values; standard deviation 1
    assert interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "interval": pytest.approx(4.303 / 3**0.5, abs=1e-3), "seeds": 3}
    assert interval([2.0])["interval"] is None


def test_muon_steps_are_orthogonal():
    """Every singular value of a first step is about the learning rate, for any gradient."""
    from lab.optimizers import MuonWithAdamW

    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.zeros(4, 6)), torch.nn.Parameter(torch.zeros(3))
    optimizer = MuonWithAdamW([("a", matrix), ("b", vector)], rate=0.1, adamw_rate=0.01)
    matrix.grad, vector.grad = torch.randn(4, 6), torch.ones(3)
    optimizer.step()
    singular = torch.linalg.svdvals(matrix.detach())
    assert singular.min() > 0.06 and singular.max() < 0.13
    torch.testing.assert_close(vector.detach(), torch.full((3,), -0.01), atol=1e-6, rtol=0)


def test_the_page_has_the_records_table():
    from lab.summary import summarize, table

    record = json.loads((BENCHMARKS / "records" / "method_lab.json").read_text())
    assert record["summary"] == json.loads(json.dumps(summarize(record["runs"])))
    assert table(record["summary"]) in (BENCHMARKS.parent / "docs" / "experiments.md").read_text()
