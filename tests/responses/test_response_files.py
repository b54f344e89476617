"""Malformed files of prompts, responses and shards: errors that name the line."""

import gzip
import json

import pytest

from coral_hf.data.sources import iter_source
from coral_hf.responses.regenerate import iter_prompts, iter_responses, write_shards
from coral_hf.responses.response_files import exclusive


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "turns": ["x"]', "line 2: not valid JSON"),
        ("[1]", "line 2: expected"),
        ('{"id": "b"}', r"line 2 has an unknown format: .*\['id'\]"),
        ('{"id": "b", "turns": []}', 'line 2: "turns" must be'),
        ('{"id": "b", "turns": [3]}', 'line 2: "turns" must be'),
        ('{"id": [7], "turns": ["x"]}', r'line 2: "id" must be a string or a number, got \'\[7\]'),
        ('{"id": "a", "turns": ["x"]}', "line 2: id 'a' already occurs on .*, line 1;"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_malformed_prompts_name_the_line(tmp_path, line, message, suffix):
    path = tmp_path / f"prompts{suffix}"
    text = '{"id": "a", "turns": ["x"]}\n' + line + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        list(iter_prompts(path))
    assert path.name in str(error.value)


def test_system_messages_of_prompts_stand_in_front(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": role, "content": role} for role in ("system", "system", "user", "assistant", "user")]
    path.write_text(json.dumps({"messages": chat}))
    (row,) = iter_prompts(path)
    assert row == {"id": row["id"], "turns": ["user", "user"], "system": "system\n\nsystem"} and len(row["id"]) == 16
    path.write_text(json.dumps({"messages": [*chat[2:], chat[0]]}))
    with pytest.raises(ValueError, match="line 1: a system message comes after others"):
        list(iter_prompts(path))
    path.write_text(json.dumps({"messages": chat, "system": "other"}))
    with pytest.raises(ValueError, match="line 1 has both a system text and a system message"):
        list(iter_prompts(path))


def test_missing_prompts_file(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl does not exist"):
        list(iter_prompts(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "prompt_ids": [1]}', '"response_ids" must be a list of token ids'),
        ('{"id": 7, "prompt_ids": [1], "response_ids": [2]}', '"id" must be a string, got 7'),
        ('{"id": "b", "turn": -1, "prompt_ids": [1], "response_ids": [2]}', '"turn" must be a number from 0, got -1'),
    ],
)
def test_malformed_responses_name_the_line(line, message, tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"id": "a", "prompt_ids": [1], "response_ids": [2]}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        list(iter_responses(path))


def test_a_malformed_row_leaves_no_shard(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    with pytest.raises(ValueError, match='row 1: "prompt_ids"'):
        write_shards([{"id": "a", "prompt_ids": [1], "response_ids": [1]}, {"id": "b"}], tmp_path / "shards")
    with pytest.raises(ValueError, match="the list contains no rows to write"):
        write_shards([], tmp_path / "shards")
    with pytest.raises(ValueError, match="rows_per_shard must be at least 1, got 0"):
        write_shards([], tmp_path / "shards", rows_per_shard=0)
    assert not (tmp_path / "shards").exists()


def test_shards_hold_an_answer_once(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    rows = [{"id": name, "turn": turn, "prompt_ids": [1], "response_ids": [turn]} for name in "ab" for turn in (0, 1)]
    sampled = {**rows[0], "temperature": 0.3}  # no float32
    for given, written in ((rows[:2], 2), (rows, 2), (rows, 0), ([*rows, sampled], 1), ([sampled], 0)):
        shards = write_shards(given, tmp_path)
        assert sum(len(list(iter_source(shard))) for shard in shards) == written
    assert len(list(iter_source(tmp_path))) == 5
    (tmp_path / "responses-00001.parquet").write_text("damaged")
    with pytest.raises(ValueError, match=r"responses-00001.parquet is damaged or not a shard .*Remove it"):
        write_shards(rows, tmp_path)


def test_shards_keep_whose_answers_they_are(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    origin = {"target": "org/name", "target_revision": "aaaa", "target_weights": "0123", "prompt_hash": "4567"}
    row = {"id": "a", "turn": 0, "prompt_ids": [1], "response_ids": [2]}
    write_shards([{**row, **origin}], tmp_path / "new")
    assert [found for _, found in iter_source(tmp_path / "new")] == [{**row, "temperature": 0.0, **origin}]
    for changed in ({"target_weights": "89ab"}, {"target_revision": "bbbb"}):
        with pytest.raises(
            ValueError, match=r"responses-00000.parquet contains answers of org/name at revision aaaa .*pack"
        ):
            write_shards([{**row, **origin, **changed}], tmp_path / "new")
    write_shards([row], tmp_path / "old")  # as earlier versions did: its columns stay those of the folder
    write_shards([{**row, "id": "b", **origin}], tmp_path / "old")
    assert len({tuple(found) for _, found in iter_source(tmp_path / "old")}) == 1


@pytest.mark.parametrize("text", ['{"id":"a","turns":["no newline"]}', '{"text": "x"}\nno newline', "notes"])
def test_nothing_is_cut_off_from_a_file_of_something_else(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    message = r"prompts.jsonl contains something else than answers.*another output file"
    with pytest.raises(ValueError, match=message), exclusive(path):
        pass
    assert path.read_text() == text


@pytest.mark.parametrize("tail", ["{", '{"id":"b","turn":0,"prompt_ids":[1,', '{"id":"b","responses":["x"]}'])
@pytest.mark.parametrize("whole", ["", '{"id":"a","prompt_ids":[1],"response_ids":[2]}\n'])
def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path, whole, tail):
    path = tmp_path / "answers.jsonl"
    path.write_text(whole + tail)
    with exclusive(path):
        assert path.read_text() == whole
