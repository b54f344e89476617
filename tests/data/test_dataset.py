"""Rows of files and data sets, the data set that a training reads, and its batches."""

import gzip
import json

import pytest
import torch

from coral_hf.data.collator import CoralDataCollator
from coral_hf.data.dataset import ConversationDataset, read_rows
from coral_hf.data.sources import RowStream
from coral_hf.utils.jsonl import read_jsonl


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


ROWS = [{"id": "a", "prompt_ids": [1, 2], "response_ids": [3]}, {"id": "ü", "prompt_ids": [4], "response_ids": [5, 6]}]


# Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_files(name, tmp_path):
    path = write_jsonl(tmp_path / name, ROWS)
    assert read_rows(path) == ROWS
    assert read_rows([str(path), path]) == ROWS * 2


def test_blank_lines_count_as_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("line", [b'{"prompt_ids": [1', b"not json"])
def test_a_malformed_line_is_named_by_its_number(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\n".join([good, good, line, good]))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not valid JSON.*Fix or remove that line"):
        read_rows(path)


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n[1, 2]\n")
    with pytest.raises(ValueError, match="line 2: expected a JSON object, got list"):
        read_rows(path)


def test_files_that_are_not_what_their_name_says_are_value_errors(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl.gz", ROWS * 200)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz, after line \d+: the file is cut off"):
        read_rows(path)
    path.write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz, after line 0: .*does not match its name"):
        read_rows(path)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, after line \d+: .*does not match its name"):
        read_rows(path)


def test_missing_empty_and_mixed_files(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl does not exist"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"absent\.parquet does not exist"):
        read_rows(tmp_path / "absent.parquet")
    with pytest.raises(ValueError, match=r"contains no \.parquet shards"):
        read_rows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows to train on"):
        read_rows(tmp_path / "empty.jsonl")
    first = write_jsonl(tmp_path / "ids.jsonl", ROWS)
    second = write_jsonl(tmp_path / "text.jsonl", [{"turns": ["hi"], "responses": ["ok"]}])
    with pytest.raises(
        ValueError, match=r"text\.jsonl, line 1 is a row of turns and responses, but .*ids\.jsonl, line 1 is one of"
    ):
        read_rows([first, second])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "turns": ["hi"]}])
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1 contains a prompt without .*coral-hf regenerate"):
        read_rows(prompts)


def test_parquet_shards(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ids = pyarrow.list_(pyarrow.uint16())
    schema = pyarrow.schema([("id", pyarrow.string()), ("prompt_ids", ids), ("response_ids", ids)])
    for index, row in enumerate(ROWS):
        table = pyarrow.Table.from_pylist([row], schema=schema)
        parquet.write_table(table, tmp_path / f"responses-{index:05d}.parquet")
    assert read_rows(tmp_path) == ROWS
    assert read_rows(tmp_path / "responses-00001.parquet") == ROWS[1:]
    dataset = ConversationDataset(read_rows(tmp_path))
    assert dataset[1]["input_ids"].tolist() == [4, 5, 6]


def test_rows_of_a_datasets_dataset():
    datasets = pytest.importorskip("datasets")
    dataset = ConversationDataset(datasets.Dataset.from_list(ROWS))
    assert len(dataset) == 2 and dataset[0]["response_mask"].tolist() == [False, False, True]


# Sources -------------------------------------------------------------------------------------------------------


def test_saved_data_sets_and_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "two") == ROWS
    assert read_rows(tmp_path / "two", split="test") == ROWS[1:]
    with pytest.raises(ValueError, match=r"two has no split 'dev'; its splits are train, test \(--split\)"):
        read_rows(tmp_path / "two", split="dev")
    write_jsonl(tmp_path / "text.jsonl", [{"turns": ["hi"], "responses": ["ok"]}])
    with pytest.raises(ValueError, match=r"one, row 0 is a row of token ids.*, but .*text\.jsonl, line 1"):
        read_rows([tmp_path / "text.jsonl", tmp_path / "one"])


def test_a_data_set_that_the_hub_cannot_give():
    pytest.importorskip("datasets")
    for name in ("org/absent", "org/absent@main:config"):
        with pytest.raises(
            ValueError, match=f"{name} is not a file or folder here, and could not be loaded .*offline"
        ):
            read_rows(name)


def test_a_data_set_whose_files_do_not_fit_together_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"org/name is not a file .* \(An error occurred while generating the dataset\)"
    ):
        read_rows("org/name")


def test_a_message_that_is_no_text_names_its_line(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    odd = [{"role": "user", "content": [{"type": "image"}]}, chat[1]]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat}, {"messages": odd}])
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 2: message 0 has a part of type 'image'.* leave the row out"
    ):
        read_rows(path)


def test_data_sets_of_the_hub_pass_name_revision_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*args, **kwargs):
        calls.append((*args, kwargs))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("org/name@v1:part", split="test") == ROWS
    assert list(RowStream("org/name").without({"a"}, lambda row: row["id"])) == ROWS[1:]
    assert calls[0] == ("org/name", "part", {"revision": "v1", "split": "test", "streaming": False})
    assert calls[1] == ("org/name", None, {"revision": None, "split": "train", "streaming": True})


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"rows\.parquet is damaged or not a Parquet file"):
        read_rows(tmp_path / "rows.parquet")


# Dataset and batches -------------------------------------------------------------------------------------------


def test_dataset_items_and_counts():
    rows = [
        {"prompt_ids": [5, 6], "response_ids": [7, 8, 8]},
        {"prompt_ids": [5] * 4, "response_ids": [9] * 4},  # cut to four prompt and two response tokens
        {"prompt_ids": [5] * 6, "response_ids": [9]},  # cut away
        {"prompt_ids": [5], "response_ids": [9]},  # no row predicts x_1
    ]
    dataset = ConversationDataset(rows, max_length=6)
    assert len(dataset) == 2
    assert (dataset.truncated, dataset.dropped) == (2, 2)
    item = dataset[0]
    assert item["input_ids"].dtype == torch.int64 and item["response_mask"].dtype == torch.bool
    assert item["input_ids"].tolist() == [5, 6, 7, 8, 8]
    assert dataset[1]["input_ids"].tolist() == [5, 5, 5, 5, 9, 9]
    assert dataset.num_response_tokens == 5
    assert dataset.response_counts(12).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 0, 0]


def test_a_dataset_without_response_tokens_is_refused():
    with pytest.raises(ValueError, match="No conversation has a response token within max_length=2"):
        ConversationDataset(ROWS, max_length=2)
    with pytest.raises(ValueError, match="row 'b': empty response mask"):
        ConversationDataset([{"id": "b", "prompt_ids": [1], "response_ids": []}])
    with pytest.raises(ValueError, match="row 0: empty response mask"):
        ConversationDataset([{"prompt_ids": [1], "response_ids": []}])


def test_collator_pads_on_the_right():
    dataset = ConversationDataset(
        [{"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt_ids": [1, 2, 3, 4], "response_ids": [9, 9]}]
    )
    batch = CoralDataCollator(pad_token_id=11)([dataset[0], dataset[1]])
    assert set(batch) == {"input_ids", "document_ids", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 11, 11], [1, 2, 3, 4, 9, 9]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, -1, -1], [0] * 6]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, -100], [-100, -100, -100, -100, 9, 9]]


def test_collator_never_labels_the_first_two_tokens():
    item = {"input_ids": [5, 6, 7], "response_mask": [True, True, True]}
    assert CoralDataCollator()([item])["labels"].tolist() == [[-100, -100, 7]]


def test_collator_adds_cached_features():
    items = [{"input_ids": torch.arange(n), "response_mask": torch.ones(n, dtype=torch.bool)} for n in (3, 5)]

    class Cache:
        def __contains__(self, ids):
            return len(ids) < 6

        def __getitem__(self, ids):
            return ids[:, None].float().expand(-1, 2)

    features = CoralDataCollator(feature_cache=Cache())(items)["features"]
    assert features.shape == (2, 5, 2)
    assert features[0, :, 0].tolist() == [0, 1, 2, 0, 0] and features[1, :, 1].tolist() == [0, 1, 2, 3, 4]
    unknown = {"input_ids": torch.arange(6), "response_mask": torch.ones(6, dtype=torch.bool)}
    assert "features" not in CoralDataCollator(feature_cache=Cache())([*items, unknown])
