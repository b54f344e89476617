"""Files of an earlier run in a verb's output: replaced by the same measurement, or at the user's request."""

import json

import pytest

from coral_hf.cli import main


PAIR = ["--target", "target", "--drafter", "drafter", "--dtype", "float32", "--data", "prompts.jsonl"]
VERBS = {
    "benchmark": ["--temperature", "0"],
    "verify": ["--temperature", "0"],
    "tune": ["--draft_depth", "2", "--draft_top_k", "1", "--draft_total_tokens", "3"],
}
FILES = {"benchmark": "benchmark.json", "verify": "check_coral.json", "tune": "tune.json"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_record_of_something_else_stays(folder, monkeypatch, capsys, verb):
    monkeypatch.chdir(folder)
    arguments = [verb, *PAIR, *VERBS[verb], "--limit", "1", "--output", "out"]
    path = folder / "out" / FILES[verb]
    path.parent.mkdir()
    path.write_text('{"mine": 1}')
    assert main([*arguments, "--max_new_tokens", "3"]) == 2
    assert f"{FILES[verb]} contains something else than a record" in capsys.readouterr().err
    assert main([*arguments, "--max_new_tokens", "3", "--overwrite", "true"]) == 0
    assert main([*arguments, "--max_new_tokens", "3"]) == 0  # measured again
    before = path.read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--max_new_tokens", "4"]) == 2
    error = capsys.readouterr().err
    assert "a record with another max_new_tokens (3, here 4), which this run would replace: give another" in error
    assert path.read_bytes() == before


def test_the_demos_figures_replace_nothing_else(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('{"mine": 1}')
    assert main(["demo", "--json", str(path)]) == 2
    assert "mine.json contains something else than a record, which this run would replace: give another --json" in (
        capsys.readouterr().err
    )
    assert path.read_text() == '{"mine": 1}'


def test_a_text_of_ones_own_is_no_card(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    card = folder / "drafter" / "README.md"
    card.write_text("# Notes\n")
    arguments = ["card", "drafter", "--unmeasured", "true"]
    assert main(arguments) == 2
    assert "README.md contains a text that coral-hf did not write" in capsys.readouterr().err
    assert card.read_text() == "# Notes\n"
    assert main([*arguments, "--overwrite", "true"]) == 0 and "coral" in card.read_text()
    assert main(arguments) == 0
    rows = [{"id": str(i), "prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + i]} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # --stage router writes as any training does
    train = ["train", "--target", "target", "--data", "rows.jsonl", "--drafter", "drafter", "--output_dir", "drafter"]
    assert main([*train, "--stage", "router", "--router_groups", "8"]) == 2
    assert "drafter contains a config.json, which this run would replace: name another" in capsys.readouterr().err
