"""The list of the ids that the text contains: against the masked full head, and what of a call it has read."""

import pytest
import torch
from helpers.batches import compare_batch
from helpers.parity import STOCK, TREES, compare, prompt_of
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from torch import nn

from coral_hf import TargetAdapter, coral_generate
from coral_hf.drafter.draft_head import FIRST_SHARE, DraftHead, FrequencyShortlist
from coral_hf.drafter.head_rows import FEWEST_ROWS, ContextList
from coral_hf.generation import slot_drafts
from coral_hf.generation.draft_levels import LevelDrafter
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tree_size import DraftCosts
from coral_hf.responses.regenerate import iter_responses, regenerate
from coral_hf.utils.compat import cache_kwarg, cache_of


def with_bias(target):
    target.set_output_embeddings(nn.Linear(32, 128, bias=True, dtype=target.dtype))
    return target.requires_grad_(False)


def slow_top_k(adapter, hidden, active: set[int], k: int):
    """Ids and log q of the full head, of which only the active ids count."""
    logits = adapter.logits(hidden)[0].float()
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[:, sorted(active)] = True
    log_q, ids = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1).topk(k)
    return ids, log_q


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "granite", "bias"])
@pytest.mark.parametrize("listed", [False, True])
@torch.no_grad()
def test_top_k_equals_the_masked_full_head(kind, listed):
    adapter = TargetAdapter(with_bias(make_target("phi3")) if kind == "bias" else make_target(kind))
    shortlist = FrequencyShortlist(9).count(torch.randperm(128)) if listed else None
    head = DraftHead(adapter, None, shortlist, reads_text=True)
    active = set(shortlist.token_ids.tolist()) if listed else set(range(128 // FIRST_SHARE))
    assert head.reads_text and head.fewest_tokens == len(active)
    # nothing yet; new ids; the same, with some that are in the list, twice, and some past the vocabulary; nothing new
    for read in ([], [[17, 90, 33]], [[90, 5, 5], [0, 128, 4000]], [[17]]):
        head.read(torch.tensor(read, dtype=torch.long))
        active |= {token for row in read for token in row if token < 128}
        for rows in (1, 5):
            hidden = torch.randn(1, rows, 32, dtype=torch.float64)
            tokens, log_probs = head.top_k(hidden, 4)
            ids, log_q = slow_top_k(adapter, hidden, active, 4)
            assert torch.equal(tokens[0], ids)
            torch.testing.assert_close(log_probs[0], log_q)
            assert torch.equal(head.argmax(hidden)[0], ids[:, 0])


@torch.no_grad()
def test_a_list_that_outgrows_its_room():
    head = nn.Linear(4, 3 * FEWEST_ROWS, dtype=torch.float64)

    class Adapter:
        vocab_size = 3 * FEWEST_ROWS

        def head_rows(self, ids):
            return head.weight[ids], head.bias[ids]

    listed = ContextList(Adapter(), torch.tensor([5, 7]))
    assert listed.logits(torch.randn(2, 4, dtype=torch.float64)) is None
    order = torch.randperm(Adapter.vocab_size)
    for part in order.split(100):
        listed.add(part)
    expected = [5, 7, *(token for token in order.tolist() if token not in (5, 7))]
    assert listed.token_ids.tolist() == expected
    features = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(listed.logits(features), head(features)[:, expected[2:]])


@pytest.mark.parametrize("tree", ["chain", "tree8"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_generation_stays_lossless(target, tree, do_sample, listed):
    drafter = make_drafter(target)
    if listed:
        drafter.add_shortlist(torch.arange(128), 40)
    settings = {**TREES[tree], "draft_head": "context"}
    _, stats = compare(target, drafter, prompt_of(30), settings, probability=0.95, do_sample=do_sample)
    assert stats.steps > 0 and (not listed or stats.n_accepted > 0)


def test_a_batch(target):
    settings = {**TREES["tree8"], "draft_head": "context"}
    compare_batch(target, make_drafter(target), [9, 1, 20, 17], settings, max_new_tokens=20)


def read_by(monkeypatch, generate) -> list[list[int]]:
    """What the heads of a call were given, call by call."""
    given, read = [], DraftHead.read

    def recorded(self, token_ids):
        given.append(token_ids.flatten().tolist())
        return read(self, token_ids)

    with monkeypatch.context() as patch:
        patch.setattr(DraftHead, "read", recorded)
        generate()
    return given


@pytest.mark.parametrize("stock", [False, True])
def test_prompt_and_answer_are_read_once(target, stock, monkeypatch):
    drafter, ids = make_drafter(target), prompt_of(30)
    settings = STOCK if stock else TREES["tree8"]
    config = {"draft_head": "context", "max_new_tokens": 20, "do_sample": False, **settings}
    outputs = []

    def generate():
        outputs.append(coral_generate(target, drafter, input_ids=ids, **config))

    given = read_by(monkeypatch, generate)
    text = [token for part in given for token in part]
    # the prompt and the first token at once, then what is new; the last step's tokens are drafted after by nobody
    assert text == outputs[0][0, : len(text)].tolist() and 30 < len(text) < outputs[0].shape[1]
    assert len(given[0]) in (30, 31) and all(given)


def test_a_continued_conversation_is_read_from_its_beginning(target, monkeypatch):
    drafter, settings = make_drafter(target), {"draft_head": "context", "draft_top_k": 2, "do_sample": False}
    first = target.generate(prompt_of(12), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt_of(5, seed=8)], dim=1)
    kwargs = {"max_new_tokens": 8, **cache_kwarg(cache_of(first))}
    given = read_by(
        monkeypatch,
        lambda: coral_generate(target, drafter, input_ids=longer, **settings, **kwargs),
    )
    assert given[0][: longer.shape[1]] == longer[0].tolist()


def test_all_other_heads_read_nothing(target):
    drafter = make_drafter(target)
    for name in (None, "full"):
        head = DraftSettings(draft_head=name).draft_head_of(drafter, TargetAdapter(target))
        assert not head.reads_text
        before = head._listed
        head.read(torch.tensor([3, 4]))
        assert head._listed is before is None


def test_slots_draft_without_the_list(tmp_path, monkeypatch):
    """The ids of many texts would soon be most of the vocabulary."""
    target = make_target()
    drafter = make_drafter(target, draft_head="context", draft_depth=3, draft_top_k=2)
    heads, costs = [], DraftCosts(tuple(10.0 + 0.2 * n for n in range(1, 65)), 0.5, 0.2)
    monkeypatch.setattr(slot_drafts, "draft_costs", lambda *_: costs)
    make = LevelDrafter.__init__

    def recorded(self, *args):
        make(self, *args)
        heads.append(self.head)

    monkeypatch.setattr(LevelDrafter, "__init__", recorded)
    prompts = [{"id": str(i), "turns": [chr(97 + i) * 5]} for i in range(3)]
    settings = {"max_new_tokens": 8, "slots": 2, "progress": False}
    for name, given in (("plain", None), ("drafts", drafter)):
        regenerate(target, make_tokenizer(), prompts, tmp_path / f"{name}.jsonl", drafter=given, **settings)
    answers = [
        {row["id"]: row["response_ids"] for row in iter_responses(tmp_path / f"{name}.jsonl")}
        for name in ("plain", "drafts")
    ]
    assert answers[0] == answers[1] and heads and not any(head.reads_text for head in heads)
