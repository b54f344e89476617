"""Streams: read while they are used, shuffled and packed alike in every run."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import (
    assert_same_weights,
    logged,
    make_args,
    make_trainer,
    quick_drafter,
    random_rows,
    weights,
)

from coral_hf.data.sources import RowStream
from coral_hf.data.streaming import StreamedConversations
from coral_hf.training.trainer import CoralTrainer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream(rows, **settings):
    return StreamedConversations(rows, None, **{"max_length": 32, "vocab_size": 128, "buffer_size": 8, **settings})


def key(item):
    return tuple(item["input_ids"].tolist())


@pytest.mark.parametrize("packing", [False, True])
def test_every_pass_holds_every_conversation_once_in_an_order_of_its_own(packing):
    rows = random_rows(20)
    expected = sorted((*row["prompt_ids"], *row["response_ids"]) for row in rows)
    items = iter(stream(rows, packing=packing))
    passes = []
    for _ in range(2):
        found = []
        while len(found) < 20:
            item = next(items)
            parts = item["input_ids"].split(item["lengths"]) if packing else [item["input_ids"]]
            found += [tuple(part.tolist()) for part in parts]
        passes.append(found)
    assert sorted(passes[0]) == sorted(passes[1]) == expected and passes[0] != passes[1]
    again = itertools.islice(stream(rows, packing=packing), 5)
    assert [key(item) for item in again] == [key(item) for item in itertools.islice(stream(rows, packing=packing), 5)]
    assert [key(item) for item in itertools.islice(stream(rows, packing=packing, seed=1), 5)] != [
        key(item) for item in itertools.islice(stream(rows, packing=packing), 5)
    ]


def test_rows_are_read_no_further_than_the_buffer():
    read = []

    class Rows:
        def __iter__(self):
            for number, row in enumerate(random_rows(1000)):
                read.append(number)
                yield row

    items = iter(stream(Rows()))
    items.__next__()
    assert max(read) < 80  # the head, by which a stream is recognised, and one buffer


def test_what_is_cut_and_left_out_is_counted(capsys):
    rows = [{"prompt_ids": [5] * 3, "response_ids": [6] * 9}, {"prompt_ids": [5] * 9, "response_ids": [6]}]
    items = list(itertools.islice(stream(rows, max_length=8), 3))
    assert [len(item["input_ids"]) for item in items] == [8, 8, 8]
    assert "2 conversations cut at max_length=8; 1 left out" in capsys.readouterr().out


def test_what_is_left_out_is_told_before_the_end_of_a_pass(capsys):
    rows = [{"id": "late", "prompt_ids": [5] * 9, "response_ids": [6]}, *random_rows(400)]
    rows.insert(5, {**rows[0], "id": "later"})
    items = iter(stream(rows, max_length=8))
    next(items)
    told = capsys.readouterr().out
    assert told.count("Skipped, like any others of this kind: row 'late': within max_length=8") == 1
    assert "'later'" not in told and "pass" not in told
    items.close()
    assert "; 2 left out, without a response token within it" in capsys.readouterr().out


def test_a_training_that_ends_within_a_pass_says_what_was_left_out(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"prompt_ids": [5] * 9, "response_ids": [6]}, *random_rows(400)])
    make_trainer(tmp_path / "out", make_target(), rows=RowStream(path), max_steps=1, max_length=9).train()
    assert "In the pass over the stream that ends here: " in capsys.readouterr().out


def test_streams_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="an iterator, which can only be read once"):
        stream(iter(random_rows(2)))
    with pytest.raises(ValueError, match="No conversation has a response token"):
        next(iter(stream([])))
    with pytest.raises(ValueError, match="token id 128, but the target's vocabulary ends at 127"):
        next(iter(stream([{"prompt_ids": [128], "response_ids": [4, 5, 6]}])))


@pytest.mark.parametrize("packing", [False, True])
def test_a_streamed_training_resumes_exactly(packing, tmp_path):
    """Beyond the end of the first pass."""
    path = write(tmp_path / "rows.jsonl", random_rows(18))
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "stream_buffer_size": 8}
    arguments |= {"packing": packing, "max_length": 24, "gradient_accumulation_steps": 2}
    arguments |= {"per_device_train_batch_size": 2, "save_total_limit": None}

    def trainer(folder, source=path):
        return make_trainer(folder, make_target(), quick_drafter(make_target()), RowStream(source), **arguments)

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert len(logged(whole, "loss")) == 8
    cut = trainer(tmp_path / "cut")
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_same_weights(weights(cut.model), weights(whole.model), rtol=0, atol=0)
    other = write(tmp_path / "other.jsonl", random_rows(18, seed=9))
    with pytest.raises(ValueError, match="another data"):
        trainer(tmp_path / "third", other).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))


def test_a_streamed_training_goes_on_with_its_buffer(tmp_path):
    def trainer(size):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "stream_buffer_size": size}
        rows = RowStream(write(tmp_path / "rows.jsonl", random_rows(18)))
        return make_trainer(tmp_path, make_target(), rows=rows, **settings)

    trainer(8).train()
    with pytest.raises(
        ValueError, match=r"another stream_buffer_size \(8, here 16\).* Continue with stream_buffer_size=8"
    ):
        trainer(16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_each_worker_would_read_the_whole_stream(monkeypatch):
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match=r"dataloader_num_workers=2: .* use 0 or 1"):
        next(iter(stream(random_rows(4))))


def test_an_iterable_data_set_trains(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(random_rows(12)).to_iterable_dataset()
    trainer = make_trainer(tmp_path, make_target(), rows=rows, eval_dataset=rows, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.evaluate()["eval_acceptance_length"] >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "A stream has no end: set max_steps"),
        ({"cache_features": "somewhere"}, "cache_features='somewhere' does not work on a stream"),
        ({"loss_vocab_size": 16}, "loss_vocab_size=16 does not work on a stream"),
    ],
)
def test_what_a_stream_cannot_serve_is_refused(settings, message, tmp_path):
    target = make_target()
    with pytest.raises(ValueError, match=message):
        CoralTrainer(
            model=quick_drafter(target),
            target_model=target,
            args=make_args(tmp_path / "out", **{"max_steps": 4, **settings}),
            train_dataset=RowStream(write(tmp_path / "rows.jsonl", random_rows(4))),
        )
