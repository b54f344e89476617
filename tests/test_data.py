"""Conversations -> ids and response masks: schemas, templates, files, batches."""

import gzip
import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coral_hf.jsonl import read_jsonl
from coral_hf.training.data import ConversationDataset, CoralDataCollator, encode_row, preview, read_rows
from coral_hf.training.sources import RowStream


WORDS = ["<unk>", "<s>", "<end>", "<start>", "user", "assistant", "\n", "\n\n", "hi", "you", "good", "day", "to", "ok"]
IDS = {word: index for index, word in enumerate(WORDS)}
CHATML = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def word_tokenizer(chat_template: str | None = CHATML, **kwargs) -> PreTrainedTokenizerFast:
    """One token a word; a line break is a token, two in a row are one (as in BPE vocabularies)."""
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\s]+"), behavior="removed", invert=True)
    kwargs = {"bos_token": "<s>", "eos_token": "<end>", "unk_token": "<unk>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<start>"], **kwargs)
    tokenizer.chat_template = chat_template
    return tokenizer


def words(ids) -> list[str]:
    return [WORDS[index] for index in ids]


def trained(ids, mask) -> list[str]:
    return [WORDS[index] for index, flag in zip(ids, mask, strict=True) if flag]


# Rows ----------------------------------------------------------------------------------------------------------


def test_rows_of_prompt_and_response_ids():
    ids, mask = encode_row({"id": "a", "prompt_ids": [5, 6, 7], "response_ids": [8, 9]})
    assert ids == [5, 6, 7, 8, 9]
    assert mask == [False, False, False, True, True]


def test_rows_of_masked_ids():
    ids, mask = encode_row({"input_ids": [5, 6, 7, 8], "response_mask": [0, 1, 0, 1]})
    assert (ids, mask) == ([5, 6, 7, 8], [False, True, False, True])


def test_rows_of_text_mask_the_response_and_its_end():
    ids, mask = encode_row({"turns": ["hi you"], "responses": ["good day"]}, word_tokenizer())
    assert words(ids) == ["<start>", "user", "\n", "hi", "you", "<end>", "\n", "<start>", "assistant", "\n",
                          "good", "day", "<end>"]  # fmt: skip
    assert mask == [False] * 10 + [True] * 3, "the template's last line break is never generated"


def test_every_turn_has_its_response():
    row = {"turns": ["hi", "good day"], "responses": ["hi you", "to you"]}
    ids, mask = encode_row(row, word_tokenizer())
    assert words(ids) == [
        "<start>", "user", "\n", "hi", "<end>", "\n", "<start>", "assistant", "\n", "hi", "you", "<end>", "\n",
        "<start>", "user", "\n", "good", "day", "<end>", "\n", "<start>", "assistant", "\n", "to", "you", "<end>",
    ]  # fmt: skip
    assert trained(ids, mask) == ["hi", "you", "<end>", "to", "you", "<end>"]
    assert [index for index, flag in enumerate(mask) if flag] == [9, 10, 11, 23, 24, 25]


def test_a_token_across_the_border_does_not_hide_a_response():
    """Rendered as a whole, the prompt's last line break and the response's first are one token."""
    tokenizer = word_tokenizer()
    assert words(tokenizer("assistant\n\nok", add_special_tokens=False)["input_ids"]) == ["assistant", "\n\n", "ok"]
    ids, mask = encode_row({"turns": ["hi", "hi"], "responses": ["\nok", "good"]}, tokenizer)
    assert words(ids[6:13]) == ["<start>", "assistant", "\n", "\n", "ok", "<end>", "\n"]
    assert trained(ids, mask) == ["\n", "ok", "<end>", "good", "<end>"]


def test_a_template_without_an_end_token():
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    ids, mask = encode_row({"turns": ["hi"], "responses": ["good day"]}, word_tokenizer(template))
    assert words(ids) == ["user", "hi", "\n", "assistant", "good", "day", "\n"]
    assert trained(ids, mask) == ["good", "day", "\n"]


def test_the_prompts_own_end_token_is_not_the_responses():
    """An empty response after a prompt that ends with EOS leaves nothing to train on, and says so."""
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    shortened = "{% for m in messages if m.content %}{{ m.content }}<end>{% endfor %}"
    ids, mask = encode_row({"turns": ["hi"], "responses": ["ok"]}, word_tokenizer(template))
    assert trained(ids, mask) == ["ok", "<end>"]
    with pytest.raises(ValueError, match="row 7: empty response mask"):
        encode_row({"turns": ["hi"], "responses": [""]}, word_tokenizer(shortened), where="row 7")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(ValueError, match="row 3: this tokenizer's chat template rewrites earlier turns"):
        encode_row({"turns": ["hi"], "responses": ["ok"]}, word_tokenizer(template), where="row 3")


def test_a_target_without_a_template_reads_plain_text():
    row = {"turns": ["hi you", "good"], "responses": ["day", "ok"]}
    ids, mask = encode_row(row, word_tokenizer(None))
    assert words(ids) == ["hi", "you", "day", "<end>", "good", "ok", "<end>"]
    assert trained(ids, mask) == ["day", "<end>", "ok", "<end>"]
    ids, mask = encode_row(row, word_tokenizer(None, eos_token=None))
    assert trained(ids, mask) == ["day", "ok"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [1], "response_ids": []}, "here: empty response mask"),
        ({"input_ids": [1, 2], "response_mask": [0, 0]}, "here: empty response mask"),
        ({"input_ids": [1, 2], "response_mask": [0, 1, 1]}, "here: 2 input_ids but 3 response_mask entries"),
        ({"prompt_ids": [1], "response_ids": ["hi"]}, "here: token ids must be integers from 0 on"),
        ({"prompt_ids": [1], "response_ids": [2.5]}, "here: token ids must be integers"),
        ({"prompt_ids": [-1], "response_ids": [2]}, "here: token ids must be integers"),
        ({"turns": ["hi", "you"], "responses": ["ok"]}, "here: 2 turns but 1 responses"),
        ({"turns": ["hi"], "responses": [None]}, "here: turns and responses must be strings; got None"),
        ({"turns": ["hi"]}, r"here has columns \['turns'\].*coral-hf regenerate"),
        ({"prompt_ids": 3, "response_ids": [1]}, "here has columns"),
    ],
)
def test_malformed_rows_name_their_place(row, message):
    with pytest.raises(ValueError, match=message):
        encode_row(row, word_tokenizer(), where="here")


def test_rows_of_text_need_a_tokenizer():
    with pytest.raises(ValueError, match="need the target's tokenizer"):
        encode_row({"turns": ["hi"], "responses": ["ok"]})


# Files ---------------------------------------------------------------------------------------------------------


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


ROWS = [{"id": "a", "prompt_ids": [1, 2], "response_ids": [3]}, {"id": "ü", "prompt_ids": [4], "response_ids": [5, 6]}]


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
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz, after line 0: .*not what its name says"):
        read_rows(path)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, after line \d+: .*not what its name says"):
        read_rows(path)


def test_missing_empty_and_mixed_files(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl does not exist"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"absent\.parquet does not exist"):
        read_rows(tmp_path / "absent.parquet")
    with pytest.raises(ValueError, match=r"holds no \.parquet shards"):
        read_rows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows to train on"):
        read_rows(tmp_path / "empty.jsonl")
    first = write_jsonl(tmp_path / "ids.jsonl", ROWS)
    second = write_jsonl(tmp_path / "text.jsonl", [{"turns": ["hi"], "responses": ["ok"]}])
    with pytest.raises(
        ValueError, match=r"text\.jsonl, line 1 has the columns of schema 'text', but .*ids\.jsonl, line 1"
    ):
        read_rows([first, second])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "turns": ["hi"]}])
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1 has columns .*coral-hf regenerate"):
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


# Dataset and batches -------------------------------------------------------------------------------------------


def test_dataset_items_and_counts():
    rows = [
        {"prompt_ids": [5, 6], "response_ids": [7, 8, 8]},
        {"prompt_ids": [5] * 4, "response_ids": [9] * 4},  # cut to four prompt and two response tokens
        {"prompt_ids": [5] * 6, "response_ids": [9]},  # cut away
        {"prompt_ids": [5], "response_ids": [9]},  # x_1 is no row's prediction
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


def test_preview_brackets_what_is_trained():
    tokenizer = word_tokenizer()
    dataset = ConversationDataset([{"turns": ["hi", "you"], "responses": ["good", "ok"]}], tokenizer)
    text = preview(dataset[0], tokenizer)
    assert text == (
        "<start>user\nhi<end>\n<start>assistant\n⟦good<end>⟧\n<start>user\nyou<end>\n<start>assistant\n⟦ok<end>⟧"
    )


# System texts, messages, plain texts ---------------------------------------------------------------------------


def test_messages_and_system_texts_render_as_turns_do():
    tokenizer = word_tokenizer()
    turns = {"system": "good", "turns": ["hi", "you"], "responses": ["ok", "day"]}
    messages = [
        {"role": "system", "content": "good"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "you"},
        {"role": "assistant", "content": "day"},
        {"role": "user", "content": "never answered"},
    ]
    ids, mask = encode_row({"messages": messages}, tokenizer)
    assert (ids, mask) == encode_row(turns, tokenizer)
    assert (ids, mask) == encode_row({"messages": messages[1:], "system": "good"}, tokenizer)
    assert trained(ids, mask) == ["ok", "<end>", "day", "<end>"]
    assert words(ids[:6]) == ["<start>", "<unk>", "\n", "good", "<end>", "\n"], "system is no word of this vocabulary"


def test_a_cut_response_does_not_end():
    """The template closes it, but the target did not: nothing may be learnt from that end."""
    row = {"turns": ["hi", "you"], "responses": ["good day", "ok"], "finish_reasons": ["length", "stop"]}
    ids, mask = encode_row(row, word_tokenizer())
    assert trained(ids, mask) == ["good", "day", "ok", "<end>"]
    assert words(ids).count("<end>") == 4, "it stays in the context"
    row["finish_reasons"] = ["stop", "length"]
    assert trained(*encode_row(row, word_tokenizer())) == ["good", "day", "<end>", "ok"]
    assert trained(*encode_row(row, word_tokenizer(None))) == ["good", "day", "<end>", "ok"]


def test_plain_texts_are_trained_whole():
    ids, mask = encode_row({"text": "hi you good"}, word_tokenizer(None))
    assert words(ids) == ["hi", "you", "good"] and all(mask)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}]}, "here: message 0 must be an object with the strings role and content"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "here: empty response mask"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "here has a system text beside a system"),
        ({"turns": ["hi"], "responses": ["ok"], "system": 3}, "here: system must be a string; got 3"),
        ({"turns": ["hi"], "responses": ["ok"], "finish_reasons": ["stop"] * 2}, "here: 2 finish_reasons but 1 resp"),
        ({"text": ["hi"]}, r"here has columns \['text'\]"),
    ],
)
def test_malformed_texts_name_their_place(row, message):
    with pytest.raises(ValueError, match=message):
        encode_row(row, word_tokenizer(), where="here")


def test_a_template_that_refuses_a_role_says_so():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    row = {"turns": ["hi"], "responses": ["ok"], "system": "good"}
    with pytest.raises(
        ValueError, match=r"here: the target's chat template refuses the roles system, user .*no system"
    ):
        encode_row(row, word_tokenizer(template), where="here")


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
    with pytest.raises(ValueError, match=r"one, row 0 has the columns of schema 'ids', but .*text\.jsonl, line 1"):
        read_rows([tmp_path / "text.jsonl", tmp_path / "one"])


def test_a_data_set_that_the_hub_cannot_give():
    pytest.importorskip("datasets")
    for name in ("org/absent", "org/absent@main:config"):
        with pytest.raises(ValueError, match=f"{name} is no file or folder here and could not be loaded .*offline"):
            read_rows(name)


def test_data_sets_of_the_hub_pass_name_revision_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*args, **kwargs):
        calls.append((*args, kwargs))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("org/name@v1:part", split="test") == ROWS
    assert list(RowStream("org/name", skip=1)) == ROWS[1:]
    assert calls[0] == ("org/name", "part", {"revision": "v1", "split": "test", "streaming": False})
    assert calls[1] == ("org/name", None, {"revision": None, "split": "train", "streaming": True})


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"rows\.parquet is damaged or no Parquet file"):
        read_rows(tmp_path / "rows.parquet")
