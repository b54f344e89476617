"""The model whose answers rows contain, and the warning of a training about other models' answers."""

from coral_hf.data.response_origin import Origin, WatchedRows


MINE = Origin("org/mine", "aaaa", "0123")
OTHERS = {"target": "org/other", "target_weights": "4567"}


def said(capsys, *rows) -> list[str]:
    assert list(WatchedRows(rows, MINE)) == list(rows)
    return capsys.readouterr().out.splitlines()


def test_answers_of_unknown_models_are_told_of_once_with_the_remedy(capsys):
    row = {"id": "a", "messages": []}
    (line,) = said(capsys, row, row, {"prompt": "hi", "completion": "ok"})
    assert line.startswith("note: row 'a', and possibly others, does not say which model wrote its answer.")
    assert "coral-hf regenerate --prompts FILE --output responses.jsonl" in line
    assert not said(capsys, {"prompt_ids": [1], "response_ids": [2]}, {"turns": [], "target": "endpoint's name"})


def test_answers_of_another_target_are_told_of_once(capsys):
    row = {"id": "b", "prompt_ids": [1], "response_ids": [2]}
    (line,) = said(capsys, row, {**row, **OTHERS}, {**row, **OTHERS}, {**row, **MINE.columns})
    assert (
        line.startswith("warning: row 'b' contains an answer of org/other (weights 4567)")
        and "coral-hf regenerate" in line
    )
