"""A real llama.cpp server with exported drafters: texts equal to plain `generate`, drafts and accepted tokens equal to our chain's.

Runs where `LLAMA_CPP_PYTHON` names an interpreter with xllamacpp beside the demo target's GGUF file, as
`scripts/engine_environment.sh llama-cpp FOLDER` makes one:

    LLAMA_CPP_PYTHON=FOLDER/bin/python python -m pytest -m real_model tests/engines/test_llama_cpp_server.py

`LLAMA_CPP_RECORD=FILE` keeps what was measured: `benchmarks/records/llama_cpp_server.json` is the last run's.
"""

import os
import time
from pathlib import Path

import pytest
import torch
from helpers.engine_records import engine_record
from helpers.llama_server import serving, write_dequantised
from helpers.served_answers import NEAR_TIE, NEW_TOKENS, PROMPTS, explain, new_ids

from coral_hf import CoralDraftModel, demo
from coral_hf.conversion import export_gguf
from coral_hf.data.prompts import encode_context


PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
if not PYTHON:
    pytest.skip("LLAMA_CPP_PYTHON names no interpreter with xllamacpp", allow_module_level=True)
pytestmark = [pytest.mark.real_model, pytest.mark.slow]

QUANTISED = Path(PYTHON).absolute().parents[1] / demo.TARGET_GGUF
DEPTH = 3
CHAIN = {"draft_depth": DEPTH, "draft_top_k": 1, "draft_total_tokens": None, "draft_cost_aware": False}
THREE = {"norm_output": False, "draft_calibration": None, "shortlist_size": 0, **CHAIN}
DRAFTERS = ("shipped drafter's layer over three features", "untrained")


@pytest.fixture(scope="module")
def real():
    target, tokenizer = demo.load_target(torch.float32)
    target.generation_config.eos_token_id = None  # every answer is as long
    return target, tokenizer, [encode_context(tokenizer, [prompt]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The demo target as published, and in float32 as Transformers computes it."""
    return {
        "float32": write_dequantised(QUANTISED, tmp_path_factory.mktemp("target") / "float32.gguf"),
        "Q4_1": QUANTISED,
    }


@pytest.fixture(scope="module")
def drafters(real):
    """Two drafters that llama.cpp supports. The first drafts usefully, although it was trained for four features."""
    target, tokenizer, _ = real
    shipped = demo.load_drafter(torch.float32)
    layers = shipped.config.target_feature_layers[1:]
    settings = {**shipped.config.to_dict(), **THREE, "target_feature_layers": layers}
    three = CoralDraftModel(type(shipped.config).from_dict(settings)).float().eval()
    state = {name: tensor for name, tensor in shipped.state_dict().items() if name in three.state_dict()}
    state["fc.weight"] = state["fc.weight"][:, shipped.config.hidden_size :]
    three.load_state_dict(state)
    torch.manual_seed(0)
    untrained = CoralDraftModel.from_target(
        target, tokenizer=tokenizer, shape="eagle3", target_feature_layers=layers, norm_output=False, **CHAIN
    )
    return dict(zip(DRAFTERS, (three, untrained), strict=True))


@pytest.fixture(scope="module")
def plain(real):
    target, _, prompts = real
    before = time.process_time()
    texts = [new_ids(target, ids) for ids in prompts]
    return texts, time.process_time() - before


@pytest.fixture(scope="module")
def record():
    about = {"prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "draft_depth": DEPTH}
    with engine_record(PYTHON, "xllamacpp", "xllamacpp", "LLAMA_CPP_RECORD", **about) as runs:
        yield runs


def our_chain(target, drafter, prompts):
    """Drafted and accepted tokens of our chain over the same answers, and its CPU time."""
    before, counts = time.process_time(), {"steps": 0, "drafted": 0, "accepted": 0}
    for ids in prompts:
        new_ids(target, ids, assistant_model=drafter)
        stats = drafter.last_stats
        counts["steps"] += stats.steps
        counts["drafted"] += sum(stats.drafted_per_depth)
        counts["accepted"] += stats.n_accepted
    return counts, time.process_time() - before


def ask(command, prompts, log):
    """Answers, counts of drafts and CPU time of a server; each step adds one token to those that it accepts."""
    with serving(PYTHON, command, log) as server:
        before = server.cpu_seconds()
        answers = [server.complete(ids[0].tolist(), NEW_TOKENS) for ids in prompts]
        used = server.cpu_seconds() - before
    timings = [answer["timings"] for answer in answers]
    counts = {
        "drafted": sum(row.get("draft_n", 0) for row in timings),
        "accepted": sum(row.get("draft_n_accepted", 0) for row in timings),
    }
    # the prompt's forward gives each answer's first token
    counts["steps"] = len(prompts) * (NEW_TOKENS - 1) - counts["accepted"]
    return answers, counts, used


def parting(target, prompts, expected, found):
    """The number of equal answers, and where the others diverge, with the gap between the float32 target's logits."""
    explained = [explain(target, *row) for row in zip(prompts, expected, found, strict=True)]
    return explained.count(None), [row for row in explained if row is not None]


@pytest.mark.parametrize(
    ("weights", "names"), [("float32", DRAFTERS), ("Q4_1", DRAFTERS[:1])], ids=["float32", "quantised"]
)
def test_served_as_plain_and_with_our_drafts(weights, names, real, files, drafters, plain, record, tmp_path):
    """With quantised weights, llama.cpp rounds activations to 8 bits. Its texts differ, and again when it drafts."""
    target, tokenizer, prompts = real
    exact, (expected, seconds) = weights == "float32", plain
    answers, _, used = ask(f"llama-server -m {files[weights]}", prompts, tmp_path / "plain.log")
    alone = [answer["tokens"] for answer in answers]
    equal, parted = parting(target, prompts, expected, alone)
    record[f"plain, {weights}"] = {
        "equal_to_generate": equal,
        "parted": parted,
        "cpu_seconds": round(used, 2),
        "generate_cpu_seconds": round(seconds, 2),
    }
    assert not exact or all(row["gap"] < NEAR_TIE for row in parted), parted
    for name in names:
        drafter = drafters[name]
        export = export_gguf(drafter, tmp_path / name.replace(" ", "-"), files[weights])
        answers, counts, used = ask(export.command, prompts, tmp_path / "drafts.log")
        ours, our_seconds = our_chain(target, drafter, prompts)
        equal, parted = parting(target, prompts, alone, [answer["tokens"] for answer in answers])
        record[f"{name}, {weights}"] = {
            "llama_cpp": counts,
            "ours": ours,
            "equal_to_plain": equal,
            "parted": parted,
            "cpu_seconds": round(used, 2),
            "our_cpu_seconds": round(our_seconds, 2),
        }
        assert all(answer["content"] == tokenizer.decode(answer["tokens"]) for answer in answers)
        assert not exact or all(row["gap"] < NEAR_TIE for row in parted), parted
        for counter, value in ours.items():
            allowed = max(1, (0.01 if exact else 0.05) * value)
            assert abs(counts[counter] - value) <= allowed, (counter, counts, ours)
