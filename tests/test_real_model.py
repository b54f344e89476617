"""The real SmolLM2-135M-Instruct and its shipped drafter."""

import json

import pytest
import torch

from coral_hf import TargetAdapter, coral_generate, demo
from coral_hf.cli import main
from coral_hf.data.dataset import read_rows
from coral_hf.data.prompts import encode_context
from coral_hf.drafter.configuration_coral import vocab_hash
from coral_hf.evaluation.batches import padded
from coral_hf.evaluation.demo_run import PROMPTS
from coral_hf.generation import hook
from coral_hf.generation.statistics import DraftStats
from coral_hf.generation.tree_size import DraftCosts
from coral_hf.utils.hardware import native_bfloat16


pytestmark = pytest.mark.real_model

THREADS = 2
SETTINGS = {
    "chain": {"draft_depth": 5, "draft_top_k": 1},
    "tree16": {"draft_depth": 5, "draft_top_k": 4, "draft_total_tokens": 16},
    "stock": {"draft_depth": 5, "draft_top_k": 1, "draft_stock_loop": True},
}


@pytest.fixture(scope="module")
def real():
    target, tokenizer = demo.load_target(torch.float32)
    return target, tokenizer, demo.load_drafter(torch.float32)


def test_the_drafter_belongs_to_the_target(real):
    target, tokenizer, drafter = real
    adapter = TargetAdapter(target)
    adapter.check_drafter(drafter.config)
    adapter.check_identity()
    assert drafter.config.target_vocab_hash == vocab_hash(tokenizer)
    assert drafter.config.target_name_or_path == demo.TARGET_NAME
    assert drafter.config.target_revision == demo.TARGET_REVISION
    weights = demo.drafter_path() / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("tree16", 3), ("chain", 1), ("stock", 1)]
    + [pytest.param(name, 3, marks=pytest.mark.exhaustive) for name in ("chain", "stock")],
)
def test_greedy_identity(real, name, count):
    """Token for token in float32, with a drafter that is really accepted."""
    target, tokenizer, drafter = real
    stats = DraftStats()
    for prompt in PROMPTS[:count]:
        ids = encode_context(tokenizer, [prompt])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 32, "do_sample": False}
        plain = target.generate(ids, **settings)
        drafted = coral_generate(target, drafter, input_ids=ids, **settings, **SETTINGS[name])
        assert torch.equal(plain, drafted)
        stats = stats.merge(drafter.last_stats)
    assert stats.acceptance_length > 1.5


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tokens"), [(4, 16), pytest.param(40, 128, marks=pytest.mark.exhaustive)])
def test_batches_are_plain_generates(count, tokens, real, monkeypatch):
    """Prompts in batches of four, row for row, where the shipped drafter's rule sizes the trees."""
    # not this machine's, which under load are those of another one
    costs = DraftCosts(tuple(10.0 + 0.5 * nodes for nodes in range(1, 65)), 1.0, 0.5)
    monkeypatch.setattr(hook, "draft_costs", lambda *_: costs)
    target, _, drafter = real
    rows = read_rows(demo.drafter_path() / "responses")  # the prompts that the package carries
    prompts = [rows[place]["prompt_ids"] for place in range(0, len(rows), len(rows) // count)][:count]
    stats, different = DraftStats(), []
    for start in range(0, len(prompts), 4):
        ids, mask = padded(prompts[start : start + 4])
        settings = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False}
        plain = target.generate(ids, **settings)
        drafted = target.generate(ids, assistant_model=drafter, **settings)
        stats = stats.merge(drafter.last_stats)
        different += [start + row for row in range(4) if not torch.equal(plain[row], drafted[row])]
    assert not different and stats.acceptance_length > 1.3


@pytest.mark.slow
def test_same_seed_same_sample(real):
    target, tokenizer, drafter = real
    ids = encode_context(tokenizer, [PROMPTS[2]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 32, "do_sample": True, "temperature": 0.8}
    torch.manual_seed(0)
    plain = target.generate(ids, **settings)
    torch.manual_seed(0)
    drafted = coral_generate(target, drafter, input_ids=ids, **settings, **SETTINGS["tree16"])
    assert torch.equal(plain, drafted)


@pytest.mark.exhaustive  # .ci/run calls the command itself
def test_demo_command(tmp_path, capsys):
    path = tmp_path / "demo.json"
    assert main(["demo", "--max-new-tokens", "24", "--prompt", "Name three colours.", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["identical"] is True and record["acceptance_length"] > 1.0
    assert record["plain"]["tokens_per_second"] > 0 and record["coral"]["tokens_per_second"] > 0
    assert record["environment"]["dtype"] == ("bfloat16" if native_bfloat16("cpu") else "float32")
    assert "identical" in capsys.readouterr().out
