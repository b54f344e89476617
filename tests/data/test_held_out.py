"""Rows held out for evaluation: whole conversations, whatever their order, and the same from a stream."""

import json
import random

import pytest

from coral_hf.data import held_out
from coral_hf.data.held_out import hold_out
from coral_hf.data.sources import RowStream


def answers(count, length=4, turns=1, **columns):
    return [
        {"id": f"p{index}", "turn": turn, "prompt_ids": [5, 6], "response_ids": [7] * length, **columns}
        for index in range(count)
        for turn in range(turns)
    ]


def ids(rows):
    return {row["id"] for row in rows}


def test_answers_to_one_prompt_stay_together():
    rows = [*answers(100), *answers(100, temperature=0.8)]
    train, held = hold_out(rows, 20)
    assert len(held) == 20 and len(train) == 180 and len(ids(held)) == 10
    assert not ids(train) & ids(held)
    train, held = hold_out(answers(50, turns=3), 10)
    assert len(held) == 9 and not ids(train) & ids(held)


def test_the_choice_knows_neither_order_nor_length():
    rows = [{"id": f"p{index}", "prompt_ids": [5], "response_ids": [6] * index} for index in range(1000)]
    _, held = hold_out(rows)
    assert len(held) == 64
    mean = sum(len(row["response_ids"]) for row in held) / 64
    assert 350 < mean < 650, "the shortest answers stand first"
    shuffled = random.Random(0).sample(rows, len(rows))
    assert ids(hold_out(shuffled)[1]) == ids(held)


def test_rows_without_ids_are_told_apart_by_their_prompts():
    texts = [{"turns": [f"q{index % 10}"], "responses": [f"a{index}"]} for index in range(40)]
    train, held = hold_out(texts, 8)
    assert len(held) == 8 and not {row["turns"][0] for row in train} & {row["turns"][0] for row in held}
    chats = [
        {"messages": [{"role": "user", "content": row["turns"][0]}, {"role": "assistant", "content": "x"}]}
        for row in texts
    ]
    assert len(hold_out(chats, 8)[1]) == 8
    assert len(hold_out([{"text": str(index)} for index in range(9)], 3)[1]) == 3


def test_by_default_at_most_a_tenth_and_never_all():
    assert [len(hold_out(answers(count))[1]) for count in (5, 30, 65, 640, 2000)] == [0, 3, 6, 64, 64]
    assert hold_out(answers(5), 0) == (answers(5), [])
    for count, message in ((5, "there are 5 rows; leave some"), (-1, "must be 0 or more")):
        with pytest.raises(ValueError, match=f"eval_rows={count}.*{message}"):
            hold_out(answers(5), count)
    with pytest.raises(ValueError, match="eval_rows=2: every conversation has too many rows"):
        hold_out(answers(3, turns=4), 2)


def test_a_stream_holds_out_the_same_rows(tmp_path, monkeypatch):
    rows = [*answers(60), *answers(60, temperature=0.8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream, held = hold_out(RowStream(path), 8)
    assert (list(stream), held) == hold_out(rows, 8)
    monkeypatch.setattr(held_out, "STREAM_ROWS", 60)  # the second answers come after the rows that are chosen from
    stream, held = hold_out(RowStream(path), 8)
    assert len(held) == 8 and not ids(stream) & ids(held) and len(list(stream)) == 104
