"""Every common format is read as intended, or refused in one line that shows an example."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.data_formats import BROKEN, CASES, share
from helpers.tiny_models import make_tokenizer

from coral_hf.cli import main
from coral_hf.data.conversations import encode_row
from coral_hf.data.dataset import ConversationDataset, read_rows
from coral_hf.data.formats import FORMATS
from coral_hf.data.overlap import find_overlap
from coral_hf.data.prompts import read_prompts
from coral_hf.data.row_reader import read_row
from coral_hf.responses.response_files import iter_prompts


ROOT = Path(__file__).parents[2]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)


def trained(row: dict) -> list:
    """The trained part of a row: its ids if it contains them, otherwise its texts."""
    tokenizer = make_tokenizer("{% for m in messages %}<1>{{ m.content }}<2>{% endfor %}")
    ids, mask = encode_row(row, tokenizer, eos_ids={2})
    runs = [[]]
    for token, flag in zip(ids, mask, strict=True):
        if flag:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    texts = [tokenizer.decode(run).removeprefix("<1>").removesuffix("<2>") for run in runs if run]
    return [run for run in runs if run] if "input_ids" in row or "prompt_ids" in row else texts


def test_there_are_enough():
    assert len(CASES) >= 60 and len(BROKEN) >= 10
    assert {read_row(json.loads(known.example), "here")[0] for known in FORMATS} == set(FORMATS)


@named
def test_files_are_trained_on_as_their_owner_means(case, tmp_path, capsys):
    path = case.write(tmp_path)
    if case.answers is None:
        with pytest.raises(ValueError, match=r"contains a prompt without an answer .*coral-hf regenerate"):
            read_rows(path, columns=case.columns)
        return
    rows = read_rows(path, columns=case.columns)
    assert [trained(row) for row in rows] == case.answers
    assert re.match(rf"Read {len(rows)} rows? of .*{path.name} as .*: with answers\.", capsys.readouterr().out)


@named
def test_files_are_answered_as_their_owner_means(case, tmp_path, capsys):
    """By regenerate, and by benchmark, tune and verify, which measure the same prompts."""
    path = case.write(tmp_path)
    if case.prompts is None:
        for read in (read_prompts, lambda *args, **kwargs: list(iter_prompts(*args, **kwargs))):
            with pytest.raises(ValueError, match=r'contains token ids.*, which are not answered .*"prompt"'):
                read(path, columns=case.columns)
        return
    prompts = read_prompts(path, columns=case.columns)
    assert [(list(prompt.turns), prompt.system) for prompt in prompts] == case.prompts
    assert re.match(rf"Read {len(prompts)} rows? of .*{path.name} as ", capsys.readouterr().out)
    rows = list(iter_prompts(path, columns=case.columns))
    assert [(row["turns"], row.get("system")) for row in rows] == case.prompts
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    if case.ids is not None:
        assert [row["id"] for row in rows] == case.ids
    assert find_overlap(rows, [turn for turns, _ in case.prompts for turn in turns]).exact == len(rows)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.file)
def test_broken_files_are_refused_in_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = case.write(tmp_path).name
    for verb in (["regenerate", "--prompts"], ["verify", "--data"]):
        assert main([*verb, name, "--output", "out"]) == 2
        error = capsys.readouterr().err.strip()
        assert name in error and "\n" not in error
        assert re.search(r'\{"prompt": "Hi!"\}|An example|[Ww]rite|[Ff]ix|[Gg]ive|Fetch|Fill|mend|rename', error), (
            error
        )
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(ValueError, match=re.escape(name)):
        read_rows(name)


def test_an_unknown_file_shows_its_keys_and_every_format(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"foo": 1, "bar": "x"}\n')
    with pytest.raises(ValueError, match=r"odd\.jsonl, line 1 has an unknown format: .*\['bar', 'foo'\]") as error:
        read_rows(tmp_path / "odd.jsonl")
    assert all(known.example in str(error.value) for known in FORMATS)


# Columns and ids -----------------------------------------------------------------------------------------------


def test_columns_are_named_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"query": "hi"}\n')
    for given, message in (
        ("prompt", "--columns 'prompt' must be NAME=COLUMN, such as prompt=query"),
        ("promt=query", "promt=query: no format has 'promt'; the names are .*prompt"),
        ("prompt=text", r"rows\.jsonl, line 1 has no column 'text' \(--columns prompt=text\); its columns are query"),
    ):
        assert main(["regenerate", "--prompts", "rows.jsonl", "--output", "out", "--columns", given]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_ids_are_made_of_what_is_asked(tmp_path, capsys):
    """Answers to one prompt belong together in any format and order; repeated prompts are answered once."""
    first, second = {"prompt": "hi"}, {"turns": ["hi"], "responses": ["ok"]}
    other, kind = {"question": "ho"}, {"prompt": "hi", "system": "be kind"}
    rows = list(iter_prompts([first, other, second, kind]))
    assert [row["turns"] for row in rows] == [["hi"], ["ho"], ["hi"]] and len({row["id"] for row in rows}) == 3
    assert "1 rows repeat an earlier prompt and are left out." in capsys.readouterr().out
    assert [row["id"] for row in iter_prompts([other, second])] == [rows[1]["id"], rows[0]["id"]]


def test_what_shares_a_file_is_counted(capsys):
    rows = [{"prompt": "hi"}, {"prompt": "hi", "completion": "ok"}, {"prompt": "ho", "response": "ok"}]
    read_prompts(rows)
    assert capsys.readouterr().out.splitlines() == [
        "Read 2 rows of the given list as prompt: 1 with answers, 1 without.",
        "Read 1 row of the given list as prompt and completion (TRL): with answers.",
    ]


# Objects in Python ---------------------------------------------------------------------------------------------


def test_objects_in_python():
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = [{"instruction": "hi you", "input": "", "output": "hello"}]
    table = pandas.DataFrame([{"prompt": "hi you", "system": "be kind"}, {"prompt": "and now", "system": None}])
    dataset = datasets.Dataset.from_list(rows)
    for given in (rows, dataset, pandas.DataFrame(rows), (row for row in rows), datasets.DatasetDict(train=dataset)):
        assert [prompt.turns for prompt in read_prompts(given)] == [("hi you",)]
    assert read_rows(dataset.with_format("numpy")) == [{"turns": ["hi you"], "responses": ["hello"]}]
    assert [prompt.system for prompt in read_prompts(table)] == ["be kind", None]
    assert [prompt.turns for prompt in read_prompts(["hi you", "and now"])] == [("hi you",), ("and now",)]
    conversations = ConversationDataset(pandas.DataFrame(rows), make_tokenizer())
    assert conversations.num_response_tokens == len("hello")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "data of type int .* give a path, a Hub id, a list"),
        ({"prompt": "hi"}, "the data are one row, .*: give a list of rows"),
        ({"test": []}, "the given data set has no split 'train'; its splits are test"),
        (["rows.jsonl", "hi you"], "'hi you' is not a file, a folder or a Hub id"),
        ([3], "row 0 is '3', of type int"),
        ("missing.csv", r"missing\.csv does not exist; give the path of a \.jsonl, \.json, \.csv"),
    ],
)
def test_what_holds_no_rows(given, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(given)


def test_calls_in_sharegpt(tmp_path):
    call = {"name": "look", "arguments": {"at": "sky"}}
    turns = share(("human", "hi"), ("function_call", json.dumps(call)), ("observation", "blue"), ("gpt", "it is blue"))
    _, row = read_row({"conversations": turns, "tools": "[]"}, "here")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"] == [{"type": "function", "function": call}] and row["tools"] == "[]"
    with pytest.raises(ValueError, match=r"here: turn 0 must be a call as a JSON object, got 'look'"):
        read_row({"conversations": share(("function_call", "look"))}, "here")


@pytest.mark.slow
def test_the_manual_lists_the_formats(tmp_path):
    page = ROOT / "docs" / "data_formats.md"
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    subprocess.run([sys.executable, ROOT / "docs" / "build_data_formats.py", copy], check=True)
    assert copy.read_text() == page.read_text()


def test_rows_without_answers_among_others_are_left_out_and_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi", "completion": "hello"}\n{"prompt": "ho"}\n')
    dataset = ConversationDataset(read_rows(tmp_path / "rows.jsonl"), make_tokenizer())
    assert len(dataset) == 1 and dataset.unusable == 1
    assert "row 1 contains a prompt without an answer" in dataset.left_out[0]
