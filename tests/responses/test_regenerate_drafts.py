"""Slots that draft give the same answers as slots that do not, with any starts, moves and ends between drafts."""

import json
import logging
import random

import pytest
import torch
from helpers.oracle import oracle
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf.cli import main
from coral_hf.generation import slot_drafts
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.key_values.slot_cache import SlotCache
from coral_hf.generation.slot_drafts import SlotDrafts
from coral_hf.generation.tree_size import DraftCosts
from coral_hf.responses.regenerate import iter_responses, regenerate


CHEAP = DraftCosts(tuple(10.0 + 0.2 * n for n in range(1, 65)), 0.5, 0.2)
DEAR = DraftCosts(tuple(10.0 * n for n in range(1, 65)), 10.0, 10.0)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Steps take no time, so that only the costs decide; a test may let it pass."""
    times = [0.0]
    monkeypatch.setattr(slot_drafts, "perf_counter", lambda: times[0])
    return times


def make_prompts(count: int, longest: int = 30, turns: int = 2, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    text = lambda: "".join(chr(rng.randint(97, 122)) for _ in range(rng.randint(1, longest)))  # noqa: E731
    return [{"id": f"p{i}", "turns": [text() for _ in range(rng.randint(1, turns))]} for i in range(count)]


def answers_of(path) -> dict:
    return {(row["id"], row["turn"]): row["response_ids"] for row in iter_responses(path)}


def texts_of(path) -> torch.Tensor:
    """All texts, `[n, L]`, for an oracle; no token follows a text."""
    texts = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in iter_responses(path)]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)


def both(target, drafter, prompts, folder, costs, monkeypatch, **settings) -> dict:
    """Answers with and without drafts, which must be the same; returns what the run with drafts reports."""
    settings = {"max_new_tokens": 20, "slots": 3, "progress": False, **settings}
    regenerate(target, make_tokenizer(), prompts, folder / "plain.jsonl", **settings)
    monkeypatch.setattr(slot_drafts, "draft_costs", lambda *_: costs)
    with oracle(texts_of(folder / "plain.jsonl"), 0.8):
        stats = regenerate(target, make_tokenizer(), prompts, folder / "drafts.jsonl", drafter=drafter, **settings)
    assert answers_of(folder / "plain.jsonl") == answers_of(folder / "drafts.jsonl")
    return stats


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_same_answers(family, top_k, tmp_path, monkeypatch):
    """More prompts than slots, some of one token, answers that end early, texts beyond a window of 16."""
    target = make_target(family)
    target.generation_config.eos_token_id = list(range(2, 14))
    drafter = make_drafter(target, draft_depth=4, draft_top_k=top_k)
    prompts = [*make_prompts(7), {"id": "one", "turns": ["a"]}]
    stats = both(target, drafter, prompts, tmp_path, CHEAP, monkeypatch)
    assert stats["acceptance_length"] > 1.5 and stats["plain_steps"] < 0.5


def test_several_features_and_a_router(tmp_path, monkeypatch):
    target = make_target()
    drafter = make_drafter(target, target_feature_layers=[1, -1], router_groups=12, router_active_groups=4)
    stats = both(target, drafter, make_prompts(5), tmp_path, CHEAP, monkeypatch)
    assert stats["acceptance_length"] > 1.1


class CheapForFew:
    """Costs of a machine that four rows use fully."""

    def at(self, rows, context):
        return CHEAP if rows < 4 else DEAR


def test_the_last_slots_draft(tmp_path, monkeypatch, caplog):
    """Drafting for all does not pay: a line reports it, and when few are left, their texts are read again."""
    target = make_target()
    caplog.set_level(logging.WARNING)
    stats = both(target, make_drafter(target), make_prompts(9), tmp_path, CheapForFew(), monkeypatch, slots=6)
    (line,) = [record.getMessage() for record in caplog.records if "slots" in record.getMessage()]
    assert line.startswith(
        "6 slots do not draft until few are left. On this machine, a forward pass over two tokens per slot takes 2.00"
    )
    assert stats["acceptance_length"] > 1.2


@pytest.mark.parametrize(("outside_ms", "pays"), [(0.5, True), (40.0, False)])
def test_what_slots_add_to_a_step_counts(tmp_path, monkeypatch, clock, outside_ms, pays):
    """The costs promise a gain. If drafting takes longer than they say, drafts end, and the next call begins without."""
    target, drafts = make_target(), []
    drafter = make_drafter(target, draft_depth=4)
    verify, propose = SlotCache.verify, SlotDrafts._propose

    def slow_verify(self, tree, *args, **kwargs):
        clock[0] += CHEAP.target_ms[tree.num_nodes - 1] / 1e3
        return verify(self, tree, *args, **kwargs)

    def slow_propose(self, texts, depth, rule):
        drafts.append(len(texts))
        clock[0] += (CHEAP.drafting_ms(depth) + outside_ms) / 1e3
        return propose(self, texts, depth, rule)

    monkeypatch.setattr(SlotCache, "verify", slow_verify)
    monkeypatch.setattr(SlotDrafts, "_propose", slow_propose)
    settings = {"max_new_tokens": 40, "slots": 3}
    shares = []
    for number in range(2):
        (folder := tmp_path / str(number)).mkdir()
        drafts.clear()
        prompts = make_prompts(9, seed=number)
        stats = both(target, drafter, prompts, folder, CHEAP, monkeypatch, **settings)
        shares.append(stats["plain_steps"])
        full = [rows for rows in drafts if rows == 3]
        assert len(full) > 20 if pays else len(full) <= (12 if number == 0 else 4)
    if pays:
        assert max(shares) < 0.4
    else:
        assert min(shares) > 0.6 and shares[1] > shares[0]


def test_drafts_after_a_shared_prefix(tmp_path, monkeypatch):
    """A system text that all prompts share is run once, and the drafter reads its states with every prompt."""
    target = make_target(dtype=torch.float64)
    drafter = make_drafter(target, draft_depth=3, draft_top_k=2)
    found = []
    for prefix in ([], [5, 6, 7, 8]):
        cache = SlotCache(target, 3)
        drafts = SlotDrafts(cache, drafter, CHEAP)
        texts = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 3], [9, 5, 6]]
        with torch.inference_mode():
            cache.share_prefix(prefix, drafts.states)
            cache.prefill(range(3), texts, drafts.take, drafts.states)
            tree = drafts._propose(texts, 3, drafts.levels.rule_at(3, 7))
        assert cache.prefix == prefix
        found.append(tree)
    assert torch.equal(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0].scores, found[1].scores)


def test_where_it_never_pays_no_drafter_runs(tmp_path, monkeypatch):
    target = make_target()
    monkeypatch.setattr(SlotDrafts, "step", None)
    stats = both(target, make_drafter(target), make_prompts(5), tmp_path, DEAR, monkeypatch)
    assert stats["plain_steps"] == 1.0 and stats["acceptance_length"] == 1.0


def test_samples_are_seeded(tmp_path, monkeypatch):
    """Samples differ from those without drafts, but have the same distribution: that of the target's own logits."""
    target = make_target()
    monkeypatch.setattr(slot_drafts, "draft_costs", lambda *_: CHEAP)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = {"max_new_tokens": 12, "slots": 3, "temperature": 1.0, "progress": False, "seed": seed}
        path = tmp_path / f"{name}.jsonl"
        regenerate(target, make_tokenizer(), make_prompts(4), path, drafter=make_drafter(target), **settings)
        found.append(answers_of(path))
    assert found[0] == found[1] != found[2]


def test_drafts_are_those_of_a_sequence_by_itself():
    """Slots that begin, move and end: every tree equals the one that the drafter proposes after reading only that text."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    target = (
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None)).double().eval()
    )  # few tokens: chance hits
    drafter = make_drafter(target, draft_depth=3, draft_top_k=3)
    cache = SlotCache(target, 3)
    drafts = SlotDrafts(cache, drafter, CHEAP)
    seen = []

    def check(texts, depth, rule):
        tree = original(texts, depth, rule)
        for slot, text in enumerate(texts):
            generator = CoralCandidateGenerator(drafter, target, drafts.settings, 200, costs=CHEAP)
            ids = torch.tensor([text])
            states = target(ids[:, :-1], output_hidden_states=True).hidden_states
            alone = generator.propose(ids, generator.features_of(states), depth)
            nodes = min(alone.num_nodes, tree.num_nodes)  # how many is the batch's choice, which is the row's
            best = [t.scores[row].sort(descending=True).values[:nodes] for t, row in ((alone, 0), (tree, slot))]
            torch.testing.assert_close(*best)
            seen.append(slot)
        return tree

    original, drafts._propose = drafts._propose, check
    texts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 1, 2, 3, 4, 5]]
    begun = [len(text) for text in texts]
    with torch.inference_mode():
        cache.prefill(range(3), texts, drafts.take, drafts.states)
        for step in range(20):
            if step == 6:
                cache.move(2, 0)
                drafts.move(2, 0)
                texts, begun = [texts[2], texts[1], [5, 4, 6, 2]], [begun[2], begun[1], 4]
                cache.prefill([2], texts[2:], drafts.take, drafts.states)
            room = [1 if step in (4, 9, 10) else 9] * 3  # without a draft
            tokens = drafts.step(texts, lambda logits: logits.argmax(-1), True, room, ())
            texts = [text + new for text, new in zip(texts, tokens, strict=True)]
    # two plain steps come first, to be timed; three others have no room
    assert len(seen) == 15 * 3 and drafts.stats.plain_steps == 5 * 3 and drafts.stats.n_accepted > 10
    for text, start in zip(texts, begun, strict=True):
        whole = target.generate(torch.tensor([text[:start]]), max_new_tokens=len(text) - start, do_sample=False)
        assert whole[0].tolist() == text


def test_command(tmp_path, monkeypatch, capsys):
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_prompts(3)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slot_drafts, "draft_costs", lambda *_: CHEAP)
    command = ["regenerate", "--target", "target", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    assert main([*command, "--drafter", "drafter", "--max_new_tokens", "6", "--slots", "2"]) == 0
    assert '"acceptance_length"' in capsys.readouterr().out
    answers = ["regenerate", "--endpoint", "http://localhost:1/v1", "--endpoint-model", "m", "--drafter", "drafter"]
    assert main([*answers, "--prompts", "prompts.jsonl", "--output", "other.jsonl"]) == 2
    assert "--drafter drafter is for --target" in capsys.readouterr().err
