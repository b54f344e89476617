"""Router, shortlist and draft head against a slow reference on the full logits."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny_models import FAMILIES, make_drafter, make_target, randomize
from torch import nn

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter, coral_generate
from coral_hf.drafter.configuration_coral import group_size
from coral_hf.drafter.draft_head import (
    DraftHead,
    FrequencyShortlist,
    LMHeadRouter,
    gathered_logits,
    grouped_logits,
    ordered_head,
)
from coral_hf.generation.candidate_generator import CoralCandidateGenerator


SETTINGS = [
    {"draft_depth": 4, "draft_top_k": 1},
    {"draft_depth": 4, "draft_top_k": 3, "draft_total_tokens": 16},
    {"draft_depth": 4, "draft_top_k": 3, "draft_total_tokens": 16, "draft_groups_per_row": True},
]


def with_bias(target):
    head = nn.Linear(32, 128, bias=True, dtype=target.dtype)
    target.set_output_embeddings(head)
    return target.requires_grad_(False)


def make_head_target(kind: str):
    return with_bias(make_target("phi3")) if kind == "bias" else make_target(kind)


def make_router(adapter, num_groups: int, seed: int = 3, clustered: bool = False) -> LMHeadRouter:
    router = LMHeadRouter(adapter.hidden_size, adapter.vocab_size, num_groups, 16, clustered).to(adapter.head_dtype)
    if clustered:
        router.token_order.copy_(torch.randperm(adapter.vocab_size, generator=torch.Generator().manual_seed(seed)))
    return randomize(router, seed).requires_grad_(False)


def ids_of(router, group: int) -> list[int]:
    order = range(router.vocab_size) if router.token_order is None else router.token_order.tolist()
    return list(order)[group * router.group_size : (group + 1) * router.group_size]


@contextmanager
def right_when_active(monkeypatch, continuation):
    """Puts the true next token first if the head's own selection contains it, so that some drafts are accepted."""
    original_logits, original_propose = DraftHead._active_logits, CoralCandidateGenerator.propose
    place = {}

    def propose(self, input_ids, *rest):
        place["next"] = input_ids.shape[1]
        return original_propose(self, input_ids, *rest)

    def active_logits(self, hidden, weights):
        logits, groups, normalizer = original_logits(self, hidden, weights)
        ids = self._token_ids(torch.arange(logits.shape[-1]).expand(logits.shape), groups)
        index = place["next"]
        place["next"] += 1
        if index < continuation.shape[1]:
            right = (ids == continuation[0, index]) & logits.isfinite()
            logits = torch.where(right, logits.amax(-1, keepdim=True) + 3, logits)
        return logits, groups, normalizer

    with monkeypatch.context() as patch:
        patch.setattr(DraftHead, "_active_logits", active_logits)
        patch.setattr(CoralCandidateGenerator, "propose", propose)
        yield


def slow_active(adapter, hidden, router=None, shortlist=None, active=1, per_row=False, weights=None):
    """Full logits, with -inf at the ids that the head must not consider, row by row."""
    logits = adapter.logits(hidden)[0].float()
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    if shortlist is not None:
        allowed[:, shortlist.token_ids] = True
    if router is not None:
        mass = router(hidden)[0].softmax(-1)
        weights = torch.ones(len(mass)) if weights is None else weights[0]
        shared = sum(weight * row for weight, row in zip(weights, mass, strict=True))
        for row in range(len(logits)):
            for group in (mass[row] if per_row else shared).topk(active).indices.tolist():
                allowed[row, ids_of(router, group)] = True
    return logits.masked_fill(~allowed, float("-inf"))


@pytest.mark.parametrize("kind", [*FAMILIES, "bias"])
@pytest.mark.parametrize("num_groups", [7, 16])  # 7 does not divide 128
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("clustered", [False, True])
@torch.no_grad()
def test_top_k_equals_the_masked_full_head(kind, num_groups, listed, per_row, clustered):
    adapter = TargetAdapter(make_head_target(kind))
    router = make_router(adapter, num_groups, clustered=clustered)
    shortlist = FrequencyShortlist(20).count(torch.randperm(128)) if listed else None
    for rows in (1, 5):
        hidden = torch.randn(1, rows, 32, dtype=torch.float64)
        weights = torch.rand(1, rows)
        head = DraftHead(adapter, router, shortlist, active_groups=2, per_row=per_row)
        tokens, log_probs = head.top_k(hidden, 6, weights)
        slow = slow_active(adapter, hidden, router, shortlist, 2, per_row, weights)
        expected, ids = slow.log_softmax(-1).topk(6)
        assert torch.equal(tokens[0], ids)
        torch.testing.assert_close(log_probs[0], expected)
    assert torch.equal(
        head.argmax(hidden[:, :1])[0], slow_active(adapter, hidden[:, :1], router, shortlist, 2).argmax(-1)
    )


@torch.no_grad()
def test_shortlist_alone_equals_the_masked_full_head():
    adapter = TargetAdapter(make_target("granite"))
    counts = torch.randint(0, 50, (128,))
    shortlist = FrequencyShortlist(31).count(counts)
    assert sorted(counts[shortlist.token_ids].tolist()) == sorted(counts.tolist())[-31:]
    hidden = torch.randn(1, 4, 32, dtype=torch.float64)
    tokens, log_probs = DraftHead(adapter, None, shortlist).top_k(hidden, 5)
    expected, ids = slow_active(adapter, hidden, shortlist=shortlist).log_softmax(-1).topk(5)
    assert torch.equal(tokens[0], ids)
    torch.testing.assert_close(log_probs[0], expected)


@pytest.mark.parametrize("clustered", [False, True])
@torch.no_grad()
def test_router_scoring_is_group_mass_times_softmax_inside(clustered):
    adapter = TargetAdapter(make_target("gemma3_text"))
    router = make_router(adapter, 7, clustered=clustered)
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    head = DraftHead(adapter, router, active_groups=7, per_row=True, scoring="router")
    tokens, log_probs = head.top_k(hidden, 128)
    full = adapter.logits(hidden)[0]
    mass = router(hidden)[0].log_softmax(-1)
    for row in range(3):
        for token, log_prob in zip(tokens[0, row].tolist(), log_probs[0, row].tolist(), strict=True):
            group = next(g for g in range(7) if token in ids_of(router, g))
            inside = full[row, ids_of(router, group)].logsumexp(-1)
            assert abs(log_prob - (mass[row, group] + full[row, token] - inside).item()) < 1e-5
    assert abs(log_probs.exp().sum().item() - 3) < 1e-5


@torch.no_grad()
def test_gathered_logits_equal_the_views():
    for kind in ("llama", "gemma3_text", "granite", "bias"):
        adapter = TargetAdapter(make_head_target(kind))
        hidden = torch.randn(1, 5, 32, dtype=torch.float64)
        for rows in (1, 5):
            groups = torch.stack([torch.randperm(7)[:3] for _ in range(rows)])[None]
            groups[0, 0, 0] = 6  # the short one
            groups[0, 0, 1:] = torch.tensor([1, 4])
            size = group_size(128, 7)
            torch.testing.assert_close(
                gathered_logits(adapter, hidden, groups, size), grouped_logits(adapter, hidden, groups, size)
            )


@torch.no_grad()
def test_the_ordered_copy_follows_its_target_and_its_router():
    target = with_bias(make_target("granite"))
    adapter, other = TargetAdapter(target), TargetAdapter(with_bias(make_target("granite", seed=7)))
    router = make_router(adapter, 7, clustered=True)
    first = ordered_head(adapter, router)
    assert torch.equal(first.head.weight, adapter.head.weight[router.token_order.long()])
    assert torch.equal(first.head.bias, adapter.head.bias[router.token_order.long()])
    assert ordered_head(TargetAdapter(target), router).head.weight is first.head.weight  # copied once
    for change in (
        lambda: adapter.head.weight.add_(1.0),
        lambda: adapter.head.bias.add_(1.0),
        lambda: router.token_order.copy_(router.token_order.flip(0)),
    ):
        before = ordered_head(adapter, router).head.weight
        change()
        after = ordered_head(adapter, router).head
        assert after.weight is not before
        assert torch.equal(after.weight, adapter.head.weight[router.token_order.long()])
        assert torch.equal(after.bias, adapter.head.bias[router.token_order.long()])
    assert torch.equal(ordered_head(other, router).head.weight, other.head.weight[router.token_order.long()])
    router.token_order[0] = router.token_order[1]
    with pytest.raises(ValueError, match="not a permutation"):
        DraftHead(adapter, router)


@torch.no_grad()
def test_two_targets_of_one_drafter_keep_their_copies():
    """Of the ordered head and of the shortlist's rows; both follow a change, and neither keeps a target alive."""
    adapters = [TargetAdapter(with_bias(make_target("granite", seed=seed))) for seed in (0, 7)]
    router, shortlist = make_router(adapters[0], 7, clustered=True), FrequencyShortlist(20).count(torch.randperm(128))

    def rows():
        heads = [DraftHead(adapter, router, shortlist) for adapter in adapters]
        return [tensor for head in heads for tensor in (head._grouped_head.head.weight, head._listed_weight)]

    first = rows()
    assert all(mine is again for mine, again in zip(first, rows(), strict=True))
    adapters[0].head.weight.add_(1.0)
    changed = rows()
    assert [mine is again for mine, again in zip(first, changed, strict=True)] == [False, False, True, True]
    assert torch.equal(changed[1], adapters[0].head.weight[shortlist.token_ids])
    shortlist.token_ids.copy_((shortlist.token_ids + 1) % 128)
    assert torch.equal(rows()[3], adapters[1].head.weight[shortlist.token_ids])
    gone = [weakref.ref(changed[2]), weakref.ref(adapters.pop().head)]
    del first, changed
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_group_mass():
    router = LMHeadRouter(8, 10, 4, 4)
    probabilities = torch.rand(2, 10)
    expected = torch.stack(
        [probabilities[:, :3].sum(1), probabilities[:, 3:6].sum(1), probabilities[:, 6:9].sum(1), probabilities[:, 9]],
        1,
    )
    torch.testing.assert_close(router.group_mass(probabilities), expected)
    clustered = LMHeadRouter(8, 10, 4, 4, clustered=True)
    clustered.token_order.copy_(torch.randperm(10))
    expected = torch.stack([probabilities[:, ids_of(clustered, group)].sum(1) for group in range(4)], 1)
    torch.testing.assert_close(clustered.group_mass(probabilities), expected)
    for group in range(4):
        ids = torch.tensor(ids_of(clustered, group))
        assert (clustered.groups_of(ids) == group).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("head", ["router", "shortlist", "both", "clustered", "low_rank", "context"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_generation_stays_lossless(family, settings, head, do_sample, prompt, monkeypatch):
    target = make_target(family)
    drafter = make_drafter(target)
    drafter.add_router(8, 2, grouping="clustered" if head == "clustered" else "consecutive")
    drafter.add_low_rank_head(target, 6, 20)
    if head == "clustered":
        drafter.router.token_order.copy_(torch.randperm(128))
        head = "router"
    if head in ("shortlist", "low_rank", "context"):  # without groups there are none per row
        settings = {name: value for name, value in settings.items() if name != "draft_groups_per_row"}
    kwargs = {"max_new_tokens": 20, "do_sample": do_sample}
    torch.manual_seed(5)
    plain = target.generate(prompt, **kwargs)
    drafter.add_shortlist(torch.bincount(plain[0, :-4], minlength=128), 40)
    torch.manual_seed(5)
    ours = coral_generate(target, drafter, input_ids=prompt, draft_head=head, **settings, **kwargs)
    assert torch.equal(ours, plain)
    torch.manual_seed(5)
    with right_when_active(monkeypatch, plain):
        ours = coral_generate(target, drafter, input_ids=prompt, draft_head=head, **settings, **kwargs)
    assert torch.equal(ours, plain)
    assert drafter.last_stats.acceptance_length > 1.1


def test_stock_loop_drafts_with_the_router(prompt):
    target = make_target()
    drafter = make_drafter(target)
    drafter.add_router(8, 2)
    plain = target.generate(prompt, max_new_tokens=16, do_sample=False)
    ours = coral_generate(target, drafter, input_ids=prompt, max_new_tokens=16, do_sample=False, draft_stock_loop=True)
    assert torch.equal(ours, plain)


def test_all_groups_draft_what_the_full_head_drafts(prompt):
    target = make_target()
    drafter = make_drafter(target)
    drafter.add_router(7)
    steps = []
    for settings in ({"draft_head": "full"}, {"draft_head": "router", "draft_active_groups": 7}):
        coral_generate(
            target, drafter, input_ids=prompt, max_new_tokens=24, do_sample=False, draft_top_k=3, **settings
        )
        steps.append(drafter.last_stats)
    assert steps[0].acceptance_length == steps[1].acceptance_length


@pytest.mark.parametrize("grouping", ["consecutive", "clustered"])
def test_router_and_shortlist_are_in_the_checkpoint(grouping, tmp_path):
    drafter = make_drafter(make_target())
    plain_keys = set(drafter.state_dict())
    drafter.add_router(8, grouping=grouping)
    if grouping == "clustered":
        drafter.router.token_order.copy_(torch.randperm(128))
    drafter.add_shortlist(torch.randperm(128), 24)
    drafter.save_pretrained(tmp_path)
    loaded = CoralDraftModel.from_pretrained(tmp_path)
    assert loaded.config.router_active_groups == 1
    assert set(drafter.state_dict()) - plain_keys == {
        "router.up_proj.weight",
        "router.up_proj.bias",
        "router.down_proj.weight",
        "router.down_proj.bias",
        "shortlist.token_ids",
    } | ({"router.token_order"} if grouping == "clustered" else set())
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize(
    ("vocab_size", "asked", "groups"),
    [
        (262_144, 768, 767),
        (256_000, 768, 767),
        (32_000, 768, 762),
        (50_257, 768, 762),
        (128_256, 512, 511),
        (151_936, 768, 768),
        (49_152, 768, 768),
        (128, 100, 64),
        (128, 1, 1),
        (128, 129, 128),
    ],
)
def test_any_number_of_groups(vocab_size, asked, groups, caplog):
    """Groups of equal size that all hold an id, by the number that the config records."""
    config = CoralDraftConfig(vocab_size=vocab_size, hidden_size=8, num_attention_heads=2, router_groups=asked)
    assert config.router_groups == groups and config.router_active_groups == max(1, groups // 16)
    assert len(caplog.records) == (groups < asked)
    router = LMHeadRouter.from_config(config)
    assert (router.num_groups, router.down_proj.out_features) == (groups, groups)
    assert router.group_size == group_size(vocab_size, asked) == group_size(vocab_size, groups)
    assert router.groups_of(torch.arange(vocab_size)).unique().tolist() == list(range(groups))
    # said once: what is saved and loaded asks for the real number
    again = CoralDraftConfig.from_dict(config.to_dict())
    assert again.router_groups == groups and len(caplog.records) == (groups < asked)


def test_a_lowered_number_of_groups_is_saved_and_loaded(tmp_path):
    drafter = make_drafter(make_target())
    assert drafter.add_router(100).num_groups == drafter.config.router_groups == 64
    drafter.save_pretrained(tmp_path)
    loaded = CoralDraftModel.from_pretrained(tmp_path)
    assert loaded.router.num_groups == 64
    assert torch.equal(loaded.router.down_proj.weight, drafter.router.down_proj.weight.to(loaded.dtype))
