"""The low-rank head against a slow reference: estimates of the full head, and the full head's own rows for the best of them."""

import re

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import TREES, compare, config_of, prompt_of
from helpers.tiny_models import FAMILIES, make_drafter, make_target, randomize
from torch import nn

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter, coral_generate
from coral_hf.drafter.draft_head import DraftHead, LowRankHead
from coral_hf.drafter.draft_initialization import truncated_svd
from coral_hf.generation.settings import DraftSettings


def with_bias(target):
    target.set_output_embeddings(nn.Linear(32, 128, bias=True, dtype=target.dtype))
    return target.requires_grad_(False)


def make_head(rank: int, seed: int = 3) -> LowRankHead:
    return randomize(LowRankHead(32, 128, rank).double(), seed).requires_grad_(False)


def slow_scores(adapter, head, row: torch.Tensor, candidates: int) -> torch.Tensor:
    """log q `[V]` after one output `[H]`, and -inf where an id cannot be drafted."""
    estimate = head.up_proj.weight @ head.down_proj.weight @ row
    if (bias := getattr(adapter.head, "bias", None)) is not None:
        estimate = estimate + bias
    logits = adapter.transform_logits(estimate)
    best = logits.argsort(descending=True)[:candidates]
    logits[best] = adapter.logits(row)[best]
    scores = torch.full_like(logits, float("-inf"))
    scores[best] = logits.log_softmax(-1)[best]
    return scores


@pytest.mark.parametrize("kind", [*FAMILIES, "bias"])
@pytest.mark.parametrize("candidates", [7, 20, 128])
@torch.no_grad()
def test_exact_scores_of_the_best_ids(kind, candidates):
    adapter = TargetAdapter(with_bias(make_target("phi3")) if kind == "bias" else make_target(kind))
    head = make_head(5)
    draft_head = DraftHead(adapter, low_rank=head, candidates=candidates)
    for batch, rows in ((1, 1), (2, 5)):
        hidden = torch.randn(batch, rows, 32, dtype=torch.float64)
        tokens, log_probs = draft_head.top_k(hidden, 6)
        for text in range(batch):
            for row in range(rows):
                expected, ids = slow_scores(adapter, head, hidden[text, row], candidates).topk(6)
                assert tokens[text, row].tolist() == ids.tolist()
                torch.testing.assert_close(log_probs[text, row].double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(draft_head.argmax(hidden), tokens[..., 0])
    assert draft_head.fewest_tokens == candidates


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@torch.no_grad()
def test_a_head_of_full_rank_is_the_full_head(family):
    """Also its probabilities, whatever the number of candidates: log q is normalised over all ids."""
    adapter = TargetAdapter(make_target(family))
    head = LowRankHead(32, 128, 32).double().requires_grad_(False)
    down, up = truncated_svd(adapter.head.weight, 32)
    head.down_proj.weight.copy_(down)
    head.up_proj.weight.copy_(up)
    hidden = torch.randn(1, 6, 32, dtype=torch.float64)
    expected = DraftHead(adapter).top_k(hidden, 10)
    for candidates in (10, 50):
        tokens, log_probs = DraftHead(adapter, low_rank=head, candidates=candidates).top_k(hidden, 10)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(log_probs, expected[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_all_probabilities_sum_to_one():
    adapter, head = TargetAdapter(make_target()), make_head(5)
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    _, log_probs = DraftHead(adapter, low_rank=head, candidates=128).top_k(hidden, 128)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 3))
    _, some = DraftHead(adapter, low_rank=head, candidates=20).top_k(hidden, 20)
    assert (some.exp().sum(-1) < 1).all()


@pytest.mark.parametrize(("rows", "size", "rank"), [(40, 12, 5), (40, 12, 12), (9000, 6, 2)])
def test_the_svd_is_the_best_of_its_rank(rows, size, rank):
    weight = torch.randn(rows, size) @ torch.diag(torch.linspace(0.1, 3, size))
    down, up = truncated_svd(weight, rank)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(up @ down, left[:, :rank] * values[:rank] @ right[:rank])
    # both carry the roots of the singular values
    torch.testing.assert_close(down.square().sum(1), values[:rank])
    torch.testing.assert_close(up.square().sum(0), values[:rank])


def test_the_svd_of_a_head_of_smaller_rank():
    weight = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    down, up = truncated_svd(weight, 8)
    torch.testing.assert_close(up @ down, weight)
    down, up = truncated_svd(torch.zeros(40, 12), 8)
    assert not (up @ down).any() and down.isfinite().all()


@pytest.mark.parametrize("how", ["added", "configured", "by name"])
def test_a_new_head_starts_as_the_svd(how, tmp_path):
    target = make_target(dtype=torch.float32)
    if how == "configured":
        drafter = make_drafter(target, low_rank_size=6, low_rank_candidates=9)
    else:
        drafter = make_drafter(target)
        target.save_pretrained(tmp_path)
        drafter.add_low_rank_head(target if how == "added" else str(tmp_path), 6, 9)
    down, up = truncated_svd(target.lm_head.weight.detach(), 6)
    head = drafter.low_rank
    product = head.up_proj.weight.double() @ head.down_proj.weight.double()
    torch.testing.assert_close(product, up @ down, rtol=1e-4, atol=1e-5)
    assert (drafter.config.low_rank_size, drafter.config.low_rank_candidates) == (6, 9)


def test_it_is_in_the_checkpoint(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    plain_keys, plain_config = set(drafter.state_dict()), drafter.config.to_dict()
    assert not plain_config.keys() & {"low_rank_size", "low_rank_candidates", "draft_head"}  # configs of before load
    drafter.add_low_rank_head(target, 6)
    assert drafter.config.low_rank_candidates == 64
    drafter.config.draft_head = "low_rank"
    drafter.save_pretrained(tmp_path)
    loaded = CoralDraftModel.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) - plain_keys == {"low_rank.down_proj.weight", "low_rank.up_proj.weight"}
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert (loaded.config.low_rank_size, loaded.config.low_rank_candidates) == (6, 64)
    assert DraftSettings.resolve(loaded.config).draft_head == "low_rank"


@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_generation_stays_lossless(target, tree, do_sample):
    drafter = make_drafter(target, low_rank_size=6, low_rank_candidates=60)
    _, stats = compare(target, drafter, prompt_of(9), TREES[tree], probability=0.9, do_sample=do_sample)
    assert stats.acceptance_length > 1.2


def test_a_batch(target):
    drafter = make_drafter(target, low_rank_size=6, low_rank_candidates=60)
    ids = torch.cat([prompt_of(9, seed) for seed in range(3)])
    plain = target.generate(ids, generation_config=config_of({}))
    with oracle(plain, 0.9):
        drafted = target.generate(ids, generation_config=config_of(TREES["tree8"]), assistant_model=drafter)
    assert torch.equal(drafted, plain) and drafter.last_stats.acceptance_length > 1.2


def test_what_a_drafter_has_and_what_a_call_names(target, prompt):
    """The low-rank head comes first; all other parts can be named."""
    drafter = make_drafter(target)
    drafter.add_router(8, 2)
    drafter.add_shortlist(torch.arange(128), 30)
    drafter.add_low_rank_head(target, 6, 9)
    adapter = TargetAdapter(target)
    for name, parts in {
        None: (False, True, False),
        "low_rank": (False, True, False),
        "full": (False, False, False),
        "shortlist": (False, False, True),
        "router": (True, False, False),
        "both": (True, False, True),
        "context": (False, False, True),
    }.items():
        head = DraftSettings(draft_head=name).draft_head_of(drafter, adapter)
        assert (head.router is not None, head.low_rank is not None, head._listed is not None) == parts, name
        assert head.reads_text == (name == "context")
    with pytest.raises(
        ValueError, match="draft_active_groups=3 is a setting for router groups, but no router is used"
    ):
        DraftSettings(draft_active_groups=3).draft_head_of(drafter, adapter)
    drafter.config.draft_head = "router"
    plain = target.generate(prompt, max_new_tokens=6, do_sample=False)
    kwargs = {"input_ids": prompt, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(coral_generate(target, drafter, **kwargs, draft_active_groups=3), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_rank_size": -1}, "low_rank_size=-1 must be between 0 (none) and hidden_size=32"),
        ({"low_rank_size": 33}, "low_rank_size=33 must be between 0 (none) and hidden_size=32"),
        ({"low_rank_size": 4, "low_rank_candidates": 0}, "low_rank_candidates=0 must be between 1 and vocab_size=128"),
        ({"low_rank_size": 4, "low_rank_candidates": 129}, "low_rank_candidates=129 must be between 1"),
        ({"low_rank_candidates": 9}, "low_rank_candidates=9 is about a low-rank head, and low_rank_size=0"),
        ({"low_rank_size": "4"}, "low_rank_size='4' must be of type int"),
        ({"draft_head": "best"}, "draft_head='best' is unknown; choose one of ['full', "),
        ({"draft_head": "low_rank"}, "draft_head='low_rank' drafts with what low_rank_size=0 leaves out"),
        ({"draft_head": "both", "router_groups": 8}, "draft_head='both' drafts with what shortlist_size=0 leaves out"),
        (
            {"low_rank_size": 4, "shape": "eagle3", "draft_vocab_size": 20},
            "draft_vocab_size=20 gives the drafter a head of its own; all others choose rows of the target's",
        ),
        (
            {"draft_head": "context", "shape": "eagle3", "draft_vocab_size": 20},
            "set router_groups, shortlist_size and low_rank_size to 0, and draft_head to null",
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CoralDraftConfig(vocab_size=128, hidden_size=32, num_attention_heads=4, **settings)


def test_a_head_that_does_not_fit_is_refused(prompt, tmp_path):
    target = make_target()
    drafter = make_drafter(target)
    for rank in (0, -1, 1.0, True, "8"):
        with pytest.raises(ValueError, match=re.escape(f"rank={rank!r} must be an integer from 1 to")):
            drafter.add_low_rank_head(target, rank)
    with pytest.raises(ValueError, match="low_rank_size=33"):
        drafter.add_low_rank_head(target, 33)
    with pytest.raises(ValueError, match="low_rank_candidates=200"):
        drafter.add_low_rank_head(target, 8, 200)
    with pytest.raises(ValueError, match="model_type='llama'"):
        drafter.add_low_rank_head(make_target("qwen2"), 8)
    with torch.device("meta"):
        elsewhere = type(target)(target.config)
    with pytest.raises(ValueError, match=r"has no values here .* load the target whole"):
        drafter.add_low_rank_head(elsewhere, 8)
    assert drafter.low_rank is None and drafter.config.low_rank_size == 0
    drafter.add_low_rank_head(target, 8, 3)
    with pytest.raises(ValueError, match="left with 3 tokens, fewer than draft_top_k=4"):
        coral_generate(target, drafter, input_ids=prompt, max_new_tokens=4, draft_top_k=4)
    drafter.save_pretrained(tmp_path)
    config = CoralDraftConfig.from_pretrained(tmp_path)
    config.low_rank_size = 9
    with pytest.raises(ValueError, match=r"low_rank\.down_proj\.weight is \[8, 32\], not \[9, 32\]"):
        CoralDraftModel.from_pretrained(tmp_path, config=config)


def test_rows_of_a_quantised_head_are_refused(prompt):
    target = make_target("qwen2", dtype=torch.float32)
    drafter = make_drafter(target, low_rank_size=6)
    target.lm_head.weight = nn.Parameter(target.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    message = r"LM head of Qwen2ForCausalLM contains .* draft_head='full'"
    with pytest.raises(ValueError, match=message):
        coral_generate(target, drafter, input_ids=prompt, max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        drafter.add_low_rank_head(target, 6)
