"""The operations of a step equal the committed table, so that no change adds an operation or a wait unnoticed."""

import json
import runpy

import pytest
import torch
from helpers.scripts import BENCHMARKS

from coral_hf.evaluation.operation_counts import OperationCounter, count_step
from coral_hf.generation import draft_levels, draft_tree, hook
from coral_hf.generation.costs.pace import Pace


RECORD = json.loads((BENCHMARKS / "records" / "operations_tiny.json").read_text())
SCRIPT = "python benchmarks/count_operations.py --tiny true --json benchmarks/records/operations_tiny.json"


@pytest.fixture(scope="module")
def found():
    for module in (draft_tree, draft_levels):  # what earlier tests have made would not be made, nor counted, here
        for function in vars(module).values():
            getattr(function, "cache_clear", lambda: None)()
    script = runpy.run_path(str(BENCHMARKS / "count_operations.py"))
    return script["count"](*script["tiny_pair"](), RECORD["max_new_tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("method", RECORD["methods"])
def test_counts_are_the_committed_table(method, found):
    """Operations differ between releases of torch and Transformers; waits are checked with all."""
    expected, now = RECORD["methods"][method], found[method]
    renew = f"{now['outside']} a step, not {expected['outside']}: fewer, or a cost that is wanted? Then run {SCRIPT}"
    versions = RECORD["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert now["tokens_per_step"] == expected["tokens_per_step"]
    if method != "prompt_lookup":  # Transformers' own loop
        assert now["outside"]["waits"] == pytest.approx(expected["outside"]["waits"], abs=0.01), renew
        if versions:
            for kind in ("operations", "kernels", "uploads"):
                assert now["outside"][kind] == pytest.approx(expected["outside"][kind], rel=0.01, abs=0.1), renew


def test_a_plain_step_asks_no_more_than_plain_generates(monkeypatch):
    """If no draft pays: the same number of kernels, one wait, no draft, and a few more operations, which are views."""

    class FirstAlone(Pace):
        """Drafts once, so that the counter knows where the prefill ends."""

        def drafts(self, costs):
            drafts, self.again = not hasattr(self, "again"), True
            return drafts

    script = runpy.run_path(str(BENCHMARKS / "count_operations.py"))
    monkeypatch.setattr(hook, "draft_costs", lambda *_: script["COSTS"])
    monkeypatch.setattr("coral_hf.generation.candidate_generator.Pace", FirstAlone)
    found = count_step(*script["tiny_pair"](), RECORD["max_new_tokens"])
    plain = RECORD["methods"]["plain"]
    assert found["tokens_per_step"] < 1.05
    assert found["outside"]["kernels"] <= plain["outside"]["kernels"] and found["outside"]["waits"] < 1.1
    assert found["outside"]["operations"] <= plain["outside"]["operations"] + 8
    forward = plain["phases"]["target_forward"]
    assert found["phases"]["target_forward"]["kernels"] <= forward["kernels"]


def counts_of(function) -> dict[str, int]:
    counter = OperationCounter()
    with counter.counting():
        function()
    return dict(counter.counts["prefill"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kinds_by_hand(mode):
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with mode():
        assert counts_of(lambda: x.t().view(-1, 2)[0]) == {"operations": 3}  # views launch nothing
        assert counts_of(lambda: torch.nn.functional.linear(x, weight))["kernels"] == 1
        assert counts_of(lambda: (x + 1).sum().item()) == {"operations": 3, "kernels": 2, "waits": 1}
        assert counts_of(lambda: (x + 1).tolist())["waits"] == 1
        assert counts_of(lambda: torch.tensor([1, 2]))["uploads"] == 1
        assert counts_of(lambda: x[x > 0])["waits"] == 1
        assert "waits" not in counts_of(lambda: x[:, [0, 1]] + x.argmax(dim=1)[:, None])


def test_parts_lie_in_their_phase():
    counter = OperationCounter()
    inner = counter.wrap(lambda x: x + 1, "target_forward")
    outer = counter.wrap(lambda x: inner(x * 2) * 3, "verify")
    with counter.counting():
        outer(torch.ones(1))  # the prefill
        outer(torch.ones(1))
        torch.ones(1) + 1
    found = {phase: counts["kernels"] for phase, counts in counter.counts.items()}
    assert found == {"prefill": 4, "masks": 2, "target_forward": 1, "bookkeeping": 3}
