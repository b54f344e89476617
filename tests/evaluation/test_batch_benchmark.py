"""Whole batches compared with plain `generate`: the record, prompts brought to one length, and the refusals."""

import json

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf.cli import main
from coral_hf.data.prompts import Prompt, encode_first_turn
from coral_hf.evaluation.batches import BatchMeasurement, batch_row, lengthened, padded, run_batches
from coral_hf.evaluation.methods import Method
from coral_hf.evaluation.plots import plot_batches


PROMPTS = [Prompt(f"p{i}", "abc", (f"w{i} w{i + 1}" + " w5" * i, "more")[: i % 2 + 1]) for i in range(5)]


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    target.generation_config.eos_token_id = list(range(3, 9))
    return target, make_tokenizer(), make_drafter(target, draft_depth=3, draft_top_k=2)


@pytest.mark.slow
def test_record(pair, tmp_path):
    target, tokenizer, drafter = pair
    methods = [Method("coral", drafter), Method("chain", drafter, {"draft_top_k": 1})]
    record = run_batches(target, tokenizer, methods, PROMPTS, tmp_path, [1, 2, 7], [None, 60, 70], 6)
    assert record == json.loads((tmp_path / "batches.json").read_text())
    assert not record["partial"] and record["batch_sizes"] == [1, 2, 7] and record["contexts"] == [None, 60, 70]
    rows = {(row["method"], row["batch_size"], row["context"]): row for row in record["runs"]}
    assert len(rows) == len(record["runs"]) == 3 * 3 * 3
    for (method, size, context), row in rows.items():
        # of five prompts the fifth has no partner, and seven rows use two of them twice
        assert (row["n_batches"], row["n_rows"]) == {1: (5, 5), 2: (2, 4), 7: (1, 7)}[size]
        assert row["identical"] == row["n_rows"] and row["tokens_per_second"] > 0
        assert row["new_tokens"] == rows["plain", size, context]["new_tokens"] <= 6 * row["n_rows"]
        assert (row["prompt_tokens"] >= 55) == (context is not None)
        if method != "plain":
            assert row["steps"] >= row["new_tokens"] / 4 and row["plain_steps"] == 0
    assert [path.name for path in plot_batches(record, tmp_path)] == ["batches.png"]
    assert (tmp_path / "batches.png").stat().st_size > 0


@pytest.mark.parametrize("context", [10, 40, 90])
def test_prompts_are_brought_to_a_length_by_the_others_text(pair, context):
    tokenizer = pair[1]
    alone = encode_first_turn(tokenizer, PROMPTS[2])[0].tolist()
    ids = lengthened(tokenizer, PROMPTS, 2, context)
    assert lengthened(tokenizer, PROMPTS, 2, None) == lengthened(tokenizer, PROMPTS, 2, 1) == alone
    assert abs(len(ids) - context) <= 6 or ids == alone  # a decoded text may be read a little otherwise
    assert ids[-8:] == alone[-8:]
    encoded = Prompt("e", "abc", ("w1",), ids=(4, 5, 6))
    assert len(lengthened(tokenizer, [encoded, *PROMPTS], 0, context)) == context
    assert lengthened(tokenizer, [encoded, *PROMPTS], 0, context)[-3:] == [4, 5, 6]


def test_padded_by_hand():
    ids, mask = padded([[5], [6, 7, 8]])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.long


def test_a_row_pairs_batch_by_batch():
    plain = [BatchMeasurement([[1, 2], [3, 4]], 2.0), BatchMeasurement([[1, 2], [3]], 3.0)]
    other = [BatchMeasurement([[1, 2], [3, 5]], 1.0), BatchMeasurement([[1, 2], [3]], 1.0)]
    row = batch_row("coral", 2, None, 9.0, {"plain": plain, "coral": other})
    assert row["speedup"] == 2.5 and row["identical"] == 3 and row["n_rows"] == 4
    assert row["new_tokens"] == 7 and row["tokens_per_second"] == 3.5


def test_decoding_is_timed_apart_from_the_prefill():
    plain = [BatchMeasurement([[1, 2, 3], [4, 5]], 5.0, prefill_seconds=2.0)]
    other = [BatchMeasurement([[1, 2, 3], [4, 5]], 4.0, prefill_seconds=3.0)]
    row = batch_row("coral", 2, None, 9.0, {"plain": plain, "coral": other})
    assert (row["speedup"], row["decoding_speedup"], row["prefill_seconds"]) == (1.25, 3.0, 3.0)
    assert plain[0].decoding_tokens_per_second == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": [0]}, "batch_size=0 must be at least 1"),
        ({"contexts": [-4]}, "context=-4 must be at least 1"),
        ({"batch_sizes": [2, 2]}, "give each value once"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"contexts": [4090]}, "exceed the 512 positions"),
    ],
)
def test_bad_sizes(pair, tmp_path, settings, message):
    target, tokenizer, drafter = pair
    with pytest.raises(ValueError, match=message):
        run_batches(target, tokenizer, [Method("coral", drafter)], PROMPTS, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_methods_of_one_prompt_at_a_time(pair, tmp_path):
    target, tokenizer, drafter = pair
    lookup = Method("prompt_lookup", None, {"prompt_lookup_num_tokens": 3})
    for method in (lookup, Method("stock", drafter, {"draft_stock_loop": True, "draft_top_k": 1})):
        with pytest.raises(ValueError, match=f"'{method.name}' answers one prompt at a time.*batch_size=1"):
            run_batches(target, tokenizer, [method], PROMPTS, tmp_path / "out", [1, 4])
        record = run_batches(target, tokenizer, [method], PROMPTS[:2], tmp_path / method.name, max_new_tokens=4)
        assert record["runs"][1]["identical"] == 2


def test_command(tmp_path, monkeypatch, capsys):
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    rows = "".join(json.dumps({"id": prompt.id, "turns": prompt.turns}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    models = ["--target", "target", "--drafter", "drafter", "--data", "prompts.jsonl"]
    command = ["benchmark", *models, "--max_new_tokens", "4", "--output", "out"]
    assert main([*command, "--batch-size", "1", "3", "--context", "30"]) == 0
    record = json.loads((tmp_path / "out" / "batches.json").read_text())
    assert [(row["batch_size"], row["method"]) for row in record["runs"]] == [
        (1, "plain"),
        (1, "coral"),
        (3, "plain"),
        (3, "coral"),
    ]
    assert not (tmp_path / "out" / "benchmark.json").exists() and "batches.png" in capsys.readouterr().out
    assert main([*command, "--batch-size", "2", "--context", "30"]) == 2  # another measurement's record is there
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--context", "30", "--temperature", "1"]) == 2
    assert "leave --profile, --server-tau and --temperature out" in capsys.readouterr().err
