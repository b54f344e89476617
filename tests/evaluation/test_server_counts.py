"""Steps and accepted tokens as vLLM counts them, against ordinary calls of every length; the columns of `benchmark`.

`tests/engines/test_vllm_server.py` compares the same counts with those of a real server.
"""

import json

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf.cli import main
from coral_hf.data.prompts import Prompt
from coral_hf.drafter.draft_head import DraftHead
from coral_hf.evaluation.benchmark import print_table, run_benchmark
from coral_hf.evaluation.methods import Method
from coral_hf.evaluation.server_counts import count_as_server
from coral_hf.generation.candidate_generator import CoralCandidateGenerator


PROMPT = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])
DEPTH = 3


@pytest.fixture
def pair(monkeypatch):
    """A target, and a drafter that is right except at every fourth place of the text."""
    target = make_target()
    drafter = make_drafter(target, draft_depth=DEPTH, draft_top_k=1)
    answer = target.generate(PROMPT, max_new_tokens=60, do_sample=False)[0]
    original, place = CoralCandidateGenerator.propose, {}

    def propose(self, input_ids, *rest):
        place["next"] = input_ids.shape[1]
        return original(self, input_ids, *rest)

    def logits(self, hidden, weights):
        result = torch.zeros(1, hidden.shape[1], self.adapter.vocab_size)
        wrong = place["next"] % 4 == 1
        result[..., (answer[place["next"]] + wrong) % self.adapter.vocab_size] = 1.0
        place["next"] += 1
        return result, None, None

    monkeypatch.setattr(CoralCandidateGenerator, "propose", propose)
    monkeypatch.setattr(DraftHead, "_active_logits", logits)
    return target, drafter, answer[PROMPT.shape[1] :].tolist()


def ordinary(target, drafter, length):
    """Steps and accepted tokens of a call of `length` tokens."""
    if length == 0:
        return 0, 0
    target.generate(PROMPT, assistant_model=drafter, max_new_tokens=length, do_sample=False)
    return drafter.last_stats.steps, drafter.last_stats.n_accepted


def counted_slowly(target, drafter, length):
    """The last step is complete at the greatest length with the same number of steps."""
    steps, _ = ordinary(target, drafter, length)
    longest = max(n for n in range(length, length + DEPTH + 1) if ordinary(target, drafter, n)[0] == steps)
    return ordinary(target, drafter, longest)


@pytest.mark.slow
def test_the_last_step_counts_whole(pair):
    target, drafter, _ = pair
    beyond = 0
    for length in (2, 3, 5, 8, 9, 16, 17):
        found = count_as_server(target, PROMPT, drafter, length)
        steps, accepted = ordinary(target, drafter, length)
        assert found == counted_slowly(target, drafter, length) and found[0] == steps
        beyond += found[1] - accepted
    assert beyond > 0  # or nothing was compared
    assert count_as_server(target, PROMPT, drafter, 1) == (0, 0)


def test_the_end_of_an_answer_ends_the_count(pair):
    target, drafter, answer = pair
    for place in (1, 6, 7, 10):
        length = answer.index(answer[place]) + 1
        expected = counted_slowly(target, drafter, length) if length > 1 else (0, 0)
        for ends in (answer[place], [127, answer[place]]):
            target.generation_config.eos_token_id = ends
            assert count_as_server(target, PROMPT, drafter, 30) == expected
            assert target.generation_config.eos_token_id == ends
        target.generation_config.eos_token_id = None


def test_settings_of_a_method_count(pair):
    target, drafter, _ = pair
    whole = count_as_server(target, PROMPT, drafter, 12)
    short = count_as_server(target, PROMPT, drafter, 12, draft_depth=1)
    assert short[0] > whole[0] and short[1] <= short[0]


def test_benchmark_records_and_prints_both_lengths(tmp_path, capsys):
    target = make_target()
    drafter = make_drafter(target, draft_depth=2, draft_top_k=1)
    prompts = [Prompt(f"p{i}", "abc", (f"w{i}", "more")) for i in range(2)]
    methods = [Method("coral", drafter), Method("lookup", None, {"prompt_lookup_num_tokens": 2})]
    record = run_benchmark(target, make_tokenizer(), methods, prompts, tmp_path, 6, [0, 1], server_tau=True)
    held = {(row["method"], row["temperature"]) for row in record["runs"] if "server_acceptance_length" in row}
    assert held == {("coral", 0.0)}
    rows = [row for row in record["runs"] if "server_acceptance_length" in row]
    assert all(row["server_acceptance_length"] >= row["acceptance_length"] for row in rows)
    print_table(record)
    assert "vLLM: tau as vLLM counts" in " ".join(capsys.readouterr().out.split())
    without = run_benchmark(target, make_tokenizer(), methods[:1], prompts, tmp_path / "without", 6)
    assert not any("server_acceptance_length" in row for row in without["runs"])
    print_table(without)
    assert "vLLM" not in capsys.readouterr().out


def test_command_line(tmp_path, monkeypatch, capsys):
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w1"}) + "\n")
    monkeypatch.chdir(tmp_path)
    command = [
        "benchmark",
        "--target",
        "target",
        "--drafter",
        "drafter",
        "--data",
        "prompts.jsonl",
        "--server-tau",
        "true",
    ]
    assert main([*command, "--max-new-tokens", "4", "--output", "out"]) == 0
    record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [("server_acceptance_length" in row) for row in record["runs"]] == [False, True] * 2
    assert main([*command, "--batch-size", "2", "--output", "batches"]) == 2
    assert "leave --profile, --server-tau and --temperature out" in capsys.readouterr().err
