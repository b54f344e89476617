"""Refusals of router, shortlist and draft head: damaged ids, contradictory settings, quantised heads."""

import re

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target
from torch import nn

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter, coral_generate
from coral_hf.generation.settings import DraftSettings


@pytest.mark.parametrize("bad", [5000, 128, -3, "twice"])
@pytest.mark.parametrize("part", ["shortlist", "draft_head"])
def test_damaged_ids_are_refused(part, bad, prompt, tmp_path):
    """They load like any numbers, and would end in an IndexError, or in a device error on a GPU."""
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, **({"draft_vocab_size": 20} if part == "draft_head" else {}))
    if part == "shortlist":
        drafter.add_shortlist(torch.arange(128), 20)
    ids = getattr(drafter, part).token_ids
    ids[3] = ids[4] if bad == "twice" else bad
    drafter.save_pretrained(tmp_path)
    damaged = CoralDraftModel.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{part}.token_ids contains .*{'twice' if bad == 'twice' else bad}.* damaged"
    ):
        target.generate(prompt, assistant_model=damaged, max_new_tokens=4)


class Quantised(torch.Tensor):
    """Claims to be float32 but contains codes, like torchao's tensors."""


class Int8Linear(nn.Linear):
    """Rows of integer codes with a scale, as bitsandbytes keeps them."""

    def __init__(self, head: nn.Linear):
        super().__init__(*reversed(head.weight.shape), bias=False, dtype=head.weight.dtype)
        self.scale = head.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((head.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("kind", ["int8", "subclass", "float8"])
def test_rows_of_a_quantised_head_are_not_drafted_from(kind, prompt):
    """Codes would be used as if they were weights; the whole head, through its module, is right."""
    target = make_target("qwen2", dtype=torch.float32)
    drafter = make_drafter(target)
    drafter.add_router(8, 2)
    drafter.add_shortlist(torch.arange(128), 24)
    weight = target.lm_head.weight.detach()
    if kind == "int8":
        target.lm_head = Int8Linear(target.lm_head)
    else:
        coded = weight.as_subclass(Quantised) if kind == "subclass" else weight.to(torch.float8_e4m3fn)
        target.lm_head.weight = nn.Parameter(coded, requires_grad=False)
    kwargs = {"input_ids": prompt, "max_new_tokens": 6, "do_sample": False}
    if kind != "float8":  # whose module torch does not multiply on a CPU
        plain = target.generate(**kwargs)
        assert torch.equal(coral_generate(target, drafter, **kwargs, draft_head="full"), plain)
    for head in ("router", "shortlist", "both"):
        with pytest.raises(ValueError, match=r"LM head of Qwen2ForCausalLM contains .* draft_head='full'"):
            coral_generate(target, drafter, **kwargs, draft_head=head)
    with pytest.raises(ValueError, match="draft_head='full'"):
        TargetAdapter(target).logits(torch.randn(1, 32), token_ids=slice(0, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_head": "router"}, "no router"),
        ({"draft_head": "shortlist"}, "no shortlist"),
        ({"draft_head": "none"}, "unknown"),
        ({"draft_active_groups": 3}, "no router is used"),
        ({"draft_active_groups": 0}, "at least 1"),
        ({"draft_scoring": "best"}, "unknown"),
    ],
)
def test_bad_settings_without_a_router(settings, message, prompt):
    target = make_target()
    with pytest.raises(ValueError, match=message):
        coral_generate(target, make_drafter(target), input_ids=prompt, max_new_tokens=4, **settings)


@pytest.mark.parametrize("head", ["shortlist", "router", "both"])
def test_a_head_of_the_drafters_own_is_no_choice_of_the_targets_rows(head):
    target = make_target()
    drafter = make_drafter(target, draft_vocab_size=20)
    with pytest.raises(
        ValueError, match=rf"draft_head='{head}' .* own head \(draft_vocab_size=20\): leave draft_head out"
    ):
        DraftSettings(draft_head=head).draft_head_of(drafter, TargetAdapter(target))
    DraftSettings(draft_head="full").draft_head_of(drafter, TargetAdapter(target))


def test_bad_settings_with_a_router():
    target = make_target()
    drafter = make_drafter(target)
    drafter.add_router(8)
    adapter = TargetAdapter(target)
    with pytest.raises(ValueError, match="more than the router's 8"):
        DraftSettings(draft_active_groups=9).draft_head_of(drafter, adapter)
    drafter.add_shortlist(torch.arange(128), 8)
    with pytest.raises(ValueError, match="active groups alone"):
        DraftSettings(draft_scoring="router").draft_head_of(drafter, adapter)
    with pytest.raises(ValueError, match="size=128"):
        drafter.add_shortlist(torch.arange(128), 128)
    for size in (12.0, "12", True, 0):
        with pytest.raises(ValueError, match=re.escape(f"size={size!r} must be an integer")):
            drafter.add_shortlist(torch.arange(128), size)
    for counts, found in ((list(range(128)), "type list"), (torch.arange(12), r"shape \(12,\)")):
        with pytest.raises(ValueError, match=f"counts of {found} must be a tensor .* 128 ids"):
            drafter.add_shortlist(counts, 8)
    assert drafter.config.shortlist_size == 8
    with pytest.raises(ValueError, match="router_active_groups=9"):
        drafter.add_router(8, 9)
    with pytest.raises(ValueError, match="router_grouping='frequency' is unknown"):
        drafter.add_router(8, grouping="frequency")
    with pytest.raises(ValueError, match="router_groups=-1 must be at least 1"):
        CoralDraftConfig(vocab_size=128, router_groups=-1)
    with pytest.raises(ValueError, match="router_groups=0 must be at least 1"):
        drafter.add_router(0)


@pytest.mark.parametrize(
    "setting", [{"draft_scoring": "router"}, {"draft_groups_per_row": True}, {"draft_active_groups": 2}]
)
def test_settings_of_a_router_that_is_not_used_are_refused(setting):
    target = make_target()
    drafter, adapter = make_drafter(target), TargetAdapter(target)
    (name, value), *_ = setting.items()
    message = re.escape(f"{name}={value!r} is a setting for router groups, but no router is used. Remove it")
    with pytest.raises(ValueError, match=message):
        DraftSettings(**setting).draft_head_of(drafter, adapter)
    drafter.add_router(8)
    with pytest.raises(ValueError, match=message):
        DraftSettings(draft_head="full", **setting).draft_head_of(drafter, adapter)
    DraftSettings(**setting).draft_head_of(drafter, adapter)


@pytest.mark.parametrize("part", ["shortlist", "router", "clustered"])
def test_adapters_on_the_head(part, prompt):
    """Selected rows would be scored without the adapters; once merged, they count, also in an earlier copy."""
    peft = pytest.importorskip("peft")
    target = make_target("qwen2")
    drafter = make_drafter(target)
    if part == "shortlist":
        drafter.add_shortlist(torch.arange(128), 40)
    else:
        drafter.add_router(8, 2, grouping="clustered" if part == "clustered" else "consecutive")
    adapted = peft.get_peft_model(target, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    call = {"input_ids": prompt, "max_new_tokens": 6}

    def scores():
        head = DraftSettings().draft_head_of(drafter, TargetAdapter(target))
        logits, groups, _ = head._active_logits(hidden, None)
        ids = head._token_ids(torch.arange(logits.shape[-1]).expand(logits.shape), groups)
        return logits, TargetAdapter(target).logits(hidden).gather(-1, ids).float()

    hidden = torch.randn(1, 1, 32, dtype=torch.float64)
    with adapted.disable_adapter():
        torch.testing.assert_close(*scores())  # and keeps its copy
    with pytest.raises(ValueError, match=r"LM head of Qwen2ForCausalLM has adapters .* Merge .* draft_head='full'"):
        adapted.generate(assistant_model=drafter, **call)
    ours = coral_generate(target, drafter, draft_head="full", **call)
    assert torch.equal(ours, target.generate(**call))
    adapted.merge_adapter()
    torch.testing.assert_close(*scores())
    target.lm_head.weight.data.mul_(0.5)
    torch.testing.assert_close(*scores())


def test_a_router_for_another_partition_is_refused(tmp_path):
    drafter = make_drafter(make_target())
    drafter.add_router(8)
    drafter.save_pretrained(tmp_path)
    config = CoralDraftConfig.from_pretrained(tmp_path)
    config.router_groups = 16
    with pytest.raises(ValueError, match=r"router\.down_proj\.bias is \[8\], not \[16\]"):
        CoralDraftModel.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize(
    ("settings", "fewest"),
    [
        ({"shortlist_size": 3}, 3),
        ({"router_groups": 64, "router_active_groups": 1}, 2),
        ({"router_groups": 43, "router_active_groups": 1}, 2),  # 43 groups of 3, the last of 2
        ({"router_groups": 43, "router_active_groups": 1, "shortlist_size": 4}, 4),
        ({"shape": "eagle3", "draft_vocab_size": 5}, 5),
        ({}, 128),
    ],
)
def test_more_branches_than_tokens_are_refused(settings, fewest, prompt):
    """Otherwise a branch would be a slot without a token, whose id may be beyond the vocabulary."""
    target = make_target()
    settings = dict(settings)
    size = settings.pop("shortlist_size", None)
    drafter = make_drafter(target, **settings)
    if size is not None:
        drafter.add_shortlist(torch.arange(128).float(), size)
    # a small tree: by default it would hold all that top_k produces, about 2 * fewest ** 2 nodes
    sizes = {"draft_depth": 3, "draft_top_k": fewest, "draft_total_tokens": 11}
    drafted = coral_generate(target, drafter, input_ids=prompt, max_new_tokens=6, **sizes)
    assert torch.equal(drafted, target.generate(prompt, max_new_tokens=6))
    with pytest.raises(ValueError, match=rf"{fewest} tokens, fewer than draft_top_k={fewest + 1}"):
        coral_generate(target, drafter, input_ids=prompt, draft_top_k=fewest + 1, max_new_tokens=6)
