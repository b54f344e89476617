"""Replayed drafts take the steps that generation takes; `tune` and the predictions, end to end on tiny models."""

import json
from contextlib import contextmanager

import pytest
import torch
from helpers.parity import config_of
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf import CoralDraftModel
from coral_hf.cli import main
from coral_hf.data.prompts import Prompt, encode_context
from coral_hf.drafter.draft_head import DraftHead
from coral_hf.evaluation.draft_traces import record_traces, replay, replay_all
from coral_hf.evaluation.prediction import check_predictions, expected_acceptance_length, predict_speedup
from coral_hf.generation import hook
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.costs import measurement
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tree_size import Calibration, DraftCosts, TreeSizeRule


PROMPTS = [Prompt(f"p{index}", "abc", (f"w{index} and {index}",)) for index in range(3)]
STAIRS = DraftCosts(tuple(10.0 + 6.0 * (n > 1) + 5.0 * ((n - 1) // 4) for n in range(1, 33)), 2.0, 1.5)


@contextmanager
def textual_oracle(answers: list[torch.Tensor]):
    """An oracle that always drafts the same at a place of a text, like a real drafter."""
    original_logits, original_propose = DraftHead._active_logits, CoralCandidateGenerator.propose
    place = {}

    def propose(self, input_ids, *rest):
        same = [row for row in answers if torch.equal(row[:, : input_ids.shape[1]], input_ids)]
        place["next"], place["row"] = input_ids.shape[1], same[0][0]
        return original_propose(self, input_ids, *rest)

    def logits(self, hidden, weights):
        generator = torch.Generator().manual_seed(place["next"])
        result = torch.randn(1, 1, self.adapter.vocab_size, generator=generator)
        if place["next"] < len(place["row"]):
            result[..., place["row"][place["next"]]] = 3.0 + 4.0 * torch.rand((), generator=generator)
        place["next"] += 1
        return result.expand(1, hidden.shape[1], -1), None, None

    DraftHead._active_logits, CoralCandidateGenerator.propose = logits, propose
    try:
        yield
    finally:
        DraftHead._active_logits, CoralCandidateGenerator.propose = original_logits, original_propose


@pytest.fixture(scope="module")
def traced():
    """A target, a drafter that is sometimes right, the traces of its drafts, and the answers."""
    target, tokenizer = make_target(), make_tokenizer()
    drafter = make_drafter(target)
    prompts = [encode_context(tokenizer, prompt.turns) for prompt in PROMPTS]
    answers = [target.generate(ids, generation_config=config_of({}, max_new_tokens=24)) for ids in prompts]
    with textual_oracle(answers):
        box = DraftSettings(draft_depth=5, draft_top_k=3)
        traces = record_traces(target, tokenizer, drafter, PROMPTS, box, max_new_tokens=24)
    return target, drafter, traces, prompts, answers


@pytest.mark.parametrize("cost_aware", [False, True])
@pytest.mark.parametrize("sizes", [(5, 3, 12), (5, 3, 4), (3, 2, 6), (4, 1, 5), (1, 3, 3), (5, 2, 14)])
def test_replayed_steps_are_those_of_generation(traced, sizes, cost_aware, monkeypatch):
    target, drafter, traces, prompts, answers = traced
    depth, top_k, total = sizes
    settings = DraftSettings(depth, top_k, total, draft_cost_aware=cost_aware)
    calibration = [[value**1.3 for value in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)]]
    monkeypatch.setattr(drafter.config, "draft_calibration", calibration if cost_aware else None)
    monkeypatch.setattr(hook, "draft_costs", lambda *_: STAIRS)
    rule = TreeSizeRule(STAIRS, total) if cost_aware else None
    overrides = {name: value for name, value in vars(settings).items() if value is not None}
    for ids, answer, trace in zip(prompts, answers, traces, strict=True):
        with textual_oracle(answers):
            config = config_of(overrides, max_new_tokens=24)
            assert torch.equal(target.generate(ids, generation_config=config, assistant_model=drafter), answer)
        stats, _ = replay_all([trace], settings, rule, Calibration(calibration) if cost_aware else None)
        assert stats == drafter.last_stats
    assert drafter.last_stats.n_accepted > 0


def test_a_trace_says_nothing_of_larger_drafts(traced):
    for sizes in (DraftSettings(draft_depth=6, draft_top_k=3), DraftSettings(draft_depth=5, draft_top_k=4)):
        with pytest.raises(ValueError, match="drafted to depth 5 with top_k 3"):
            replay(traced[2][0], sizes)


def test_prediction_by_hand():
    assert expected_acceptance_length([]) == 1.0
    assert expected_acceptance_length([0.5, 0.5]) == 1.75
    assert predict_speedup(10.0, 20.0, 3.0) == pytest.approx(1.5)
    # a prefill that both ways spend: (30 + 100) / (30 + 66.7)
    assert predict_speedup(10.0, 20.0, 3.0, tokens=10, prefill_ms=30.0) == pytest.approx(130 / (30 + 200 / 3))
    for bad in ((0.0, 1.0, 2.0), (1.0, 1.0, 0.5)):
        with pytest.raises(ValueError, match="must be positive"):
            predict_speedup(*bad)
    with pytest.raises(ValueError, match="from 0 to 1"):
        expected_acceptance_length([1.5])


def test_check_predictions():
    environment = {"device": "cpu", "dtype": "float32", "threads": 2}
    drafting = [{"draft_top_k": 2, "draft_active_groups": None, "first_level_ms": 2.0, "level_ms": 1.0}]
    box = {"draft_depth": 3, "draft_top_k": 2, "draft_total_tokens": 4}
    aware = {**box, "step_ms": 20.0}
    tuned = {"environment": environment, "drafting": drafting, "cost_aware": [aware], "prefill_steps": 0.0}
    tuned["target_ms"] = [10.0, 16.0, 16.0, 16.0]
    settings = {"tree": box, "aware": {**box, "draft_cost_aware": True}, "wide": {**box, "draft_top_k": 5}}
    row = {"benchmark": "all", "temperature": 0.0, "steps": 5, "new_tokens": 10, "n_turns": 1}
    runs = [{**row, "method": name, "acceptance_length": 2.0, "speedup": 1.0} for name in ("plain", *settings)]
    rows = check_predictions(tuned, {"environment": environment, "draft_settings": settings, "runs": runs})
    # 2 tokens of 10 ms each in 2 + 2 * 1 + 16 ms, or in the 20 ms of the replay
    assert [(row["method"], row["predicted"], row["error"]) for row in rows] == [
        ("tree", 1.0, 0.0),
        ("aware", 1.0, 0.0),
    ]
    other = {"environment": {**environment, "threads": 1}, "draft_settings": settings, "runs": runs}
    with pytest.raises(ValueError, match="threads=2"):
        check_predictions(tuned, other)
    measured = {"environment": environment, "draft_settings": settings, "runs": runs}
    with pytest.raises(ValueError, match="of target 'a', the benchmark is of 'b'"):
        check_predictions(tuned | {"target": "a"}, measured | {"target": "b"})
    tuned |= {"target": "a", "drafter_sha256": "1" * 64}
    with pytest.raises(ValueError, match=r"drafter_sha256 1{12}\.\.\., the benchmark is of 2{12}\.\.\.: tune again"):
        check_predictions(tuned, measured | {"target": "a", "drafter_sha256": "2" * 64})
    # of a benchmark of two drafters, the rows of the one that was tuned
    drafters = {name: {"drafter_sha256": str(index) * 64} for index, name in enumerate(settings, start=1)}
    rows = check_predictions(tuned, measured | {"drafter_sha256": None, "drafters": drafters})
    assert [row["method"] for row in rows] == ["tree"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny target, its drafter with a router, and prompts; costs are measured in one round."""
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target, router_groups=8, router_active_groups=4).save_pretrained(tmp_path / "drafter")
    rows = "".join(json.dumps({"id": prompt.id, "turns": prompt.turns}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measurement, "_MIN_ROUNDS", 1)
    monkeypatch.setattr(measurement, "_MAX_ROUNDS", 1)
    return tmp_path


TUNE = ["tune", "--target", "target", "--drafter", "drafter", "--dtype", "float32", "--output", "out"]


@pytest.mark.slow
def test_tune_command(folder, capsys):
    sizes = ["--draft-depth", "3", "--draft-top-k", "2", "--draft-total-tokens", "8", "--max-new-tokens", "10"]
    weights = (folder / "drafter" / "model.safetensors").read_bytes()
    assert main([*TUNE, "--data", "prompts.jsonl", "--limit", "2", *sizes, "--save", "true"]) == 0
    output = capsys.readouterr().out
    assert "predicted, not measured" in output and "best by prediction" in output
    record = json.loads((folder / "out" / "tune.json").read_text())
    assert len(record["target_ms"]) == 8 and len(record["calibration"]) == 3
    assert {row["draft_active_groups"] for row in record["drafting"]} == {2, 4, 8}
    for name in ("fixed", "cost_aware"):
        speedups = [row["predicted_speedup"] for row in record[name]]
        assert speedups == sorted(speedups, reverse=True) and min(speedups) > 0
        assert all(row["acceptance_length"] >= 1 for row in record[name])
    drafter = CoralDraftModel.from_pretrained(folder / "drafter")
    assert drafter.config.draft_calibration == record["calibration"]
    assert (folder / "drafter" / "model.safetensors").read_bytes() == weights
    assert not list(folder.glob("**/*.part"))
    # the costs that generate keeps are those of now, for the sizes that were saved
    (kept,) = (folder / "cache" / "draft_costs").iterdir()
    content = json.loads(kept.read_text())
    assert content["key"]["settings"]["draft_total_tokens"] == drafter.config.draft_total_tokens
    content["tables"][0]["costs"]["level_ms"] = 98765.0
    kept.write_text(json.dumps(content))
    again = [*TUNE, "--data", "prompts.jsonl", "--limit", "1", "--overwrite", "true", *sizes]
    assert main(again) == 0  # nothing saved: the same sizes
    assert list((folder / "cache" / "draft_costs").iterdir()) == [kept]
    assert json.loads(kept.read_text())["tables"][0]["costs"]["level_ms"] < 98765.0
    # and the saved settings generate
    arguments = ["benchmark", *TUNE[1:-2], "--data", "prompts.jsonl", "--limit", "1", "--max-new-tokens", "6"]
    assert main([*arguments, "--output", "bench", "--method", "coral", "coral_aware:draft_cost_aware=true"]) == 0
    measured = json.loads((folder / "bench" / "benchmark.json").read_text())
    assert measured["draft_settings"]["coral_aware"]["draft_cost_aware"] is True
    assert all(row["identical"] == row["n_turns"] for row in measured["runs"])


def test_tune_says_where_no_size_pays(folder, capsys, monkeypatch):
    """If a forward's cost grows with every token, drafting gains nothing; if it is constant, drafting helps."""
    for target_ms, told in ([[1.0, 1e3, 1e6], True], [[1e3] * 3, False]):
        costs = DraftCosts(tuple(target_ms), first_level_ms=0.1, level_ms=0.1)
        monkeypatch.setattr("coral_hf.evaluation.tune.measure_costs", lambda *args, costs=costs: costs)
        sizes = ["--draft-depth", "2", "--draft-top-k", "1", "--draft-total-tokens", "3", "--max-new-tokens", "10"]
        assert main([*TUNE, "--data", "prompts.jsonl", "--limit", "2", *sizes]) == 0
        output = capsys.readouterr().out
        assert "best by prediction" in output
        assert (
            "warning: no draft size is predicted to be faster than plain generate on this machine" in output
        ) == told


def test_tune_refuses(folder, capsys):
    (folder / "empty.jsonl").write_text("")
    for arguments, message in (
        (["--data", "empty.jsonl"], "contains no prompts"),
        (["--data", "prompts.jsonl", "--drafter", "org/name", "--save", "true"], "is not a folder"),
        (
            ["--data", "prompts.jsonl", "--drafter", "demo", "--save", "true"],
            "--save would change the shipped drafter",
        ),
        (["--data", "prompts.jsonl", "--draft-total-tokens", "1"], "draft_total_tokens=1"),
        (["--data", "prompts.jsonl", "--max-new-tokens", "1"], "--max-new-tokens 1 must be at least 2"),
        (["--data", "prompts.jsonl", "--temperature", "nan"], "temperature=nan must be a finite number"),
    ):
        assert main([*TUNE, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "out").exists()
