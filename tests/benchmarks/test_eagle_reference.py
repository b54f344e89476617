"""`benchmarks/rivals/eagle_reference.py`: weights by EAGLE's names, what is refused, clocks; EAGLE's code where it is at hand.

EAGLE_CHECKOUT names a checkout of https://github.com/SafeAILab/EAGLE; without it, the tests that run its code are skipped.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.engine_drafters import DRAFT_IDS, THREE, eight_layer_target, make
from helpers.tiny_models import make_drafter, make_target


CHECKOUT = os.environ.get("EAGLE_CHECKOUT")
PROMPTS = [torch.tensor([[5, 9, 3, 77, 31]]), torch.tensor([[31, 8, 100, 64, 2, 17, 9]])]
TREE = {"draft_depth": 4, "draft_top_k": 3, "draft_total_tokens": 14, "draft_cost_aware": False}


@pytest.fixture
def scripts(monkeypatch):
    folder = Path(__file__).parents[2] / "benchmarks" / "rivals"
    monkeypatch.syspath_prepend(str(folder))
    import eagle_checkout
    import eagle_reference

    return SimpleNamespace(checkout=eagle_checkout, reference=eagle_reference)


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


def test_weights_by_eagles_names(scripts, target):
    drafter = make("eagle3, head of its own", target)
    weights = scripts.checkout.drafter_weights(drafter, target)
    assert torch.equal(weights["midlayer.self_attn.q_proj.weight"], drafter.layer.self_attn.q_proj.weight)
    assert torch.equal(weights["lm_head.weight"], drafter.draft_head.weight) and "norm.weight" in weights
    assert torch.equal(torch.arange(10) + weights["d2t"], DRAFT_IDS)
    assert torch.equal(weights["embed_tokens.weight"], target.get_input_embeddings().weight)
    assert scripts.checkout.adaptations(drafter.config) == []


def test_a_shortlist_becomes_a_head_of_its_own(scripts, target):
    drafter = make_drafter(target, dtype=torch.float32, shape="eagle3", target_feature_layers=[1, 3, 5, 6])
    drafter.add_shortlist(torch.arange(128), 20)  # the last ids are the most frequent
    weights = scripts.checkout.drafter_weights(drafter, target)
    assert torch.equal(weights["lm_head.weight"], target.get_output_embeddings().weight[108:])
    assert torch.equal(torch.arange(20) + weights["d2t"], torch.arange(108, 128))
    assert "fed_back_norm.weight" in weights and "norm.weight" not in weights
    assert scripts.checkout.adaptations(drafter.config) == ["features of layers [1, 3, 5, 6]", "norm_output"]


def test_what_eagle_lacks_is_refused(scripts, target, tmp_path):
    for settings, message in (
        ({**THREE, "norm_before_residual": True}, "norm_before_residual=True"),
        ({**THREE, "norm_before_fc": True}, "norm_before_fc=True"),
        ({**THREE, "router_groups": 4}, "router_groups=4"),
        ({**THREE, "attention_bias": True}, "attention_bias=True"),
        ({"shape": "eagle", "shortlist_size": 20}, "shortlist_size=20"),
    ):
        with pytest.raises(ValueError, match=f"EAGLE's code cannot express this pair: {message}"):
            scripts.checkout.check_expressible(make_drafter(target, dtype=torch.float32, **settings), target)
    other = make_target("qwen2")
    with pytest.raises(ValueError, match="this one is a qwen2"):
        scripts.checkout.check_expressible(make_drafter(other), other)
    with pytest.raises(ValueError, match=r"contains no eagle/model/ea_model\.py"):
        scripts.checkout.load_checkout(str(tmp_path))


def test_the_clock_leaves_the_targets_forward_and_the_prefill_out(scripts):
    now = iter(range(100))
    clock = scripts.reference.StepClock(lambda: next(now))
    forward = clock.wrap(lambda: None, "target_forward")
    forward()  # the prefill: the clock is not read
    clock.wrap(lambda: None, "draft")()  # begins at 0
    forward()  # 1 to 2
    forward()  # 3 to 4
    assert clock.outside() == 3 and clock.forwards == 2  # at 5


needs_eagle = pytest.mark.skipif(CHECKOUT is None, reason="EAGLE_CHECKOUT names no checkout of EAGLE")


@needs_eagle
@pytest.mark.parametrize(
    "name",
    [
        "eagle",
        "eagle with fc bias",
        "eagle3, one feature",
        "eagle3, pre-norm state fed back",
        "eagle3, three features",
        "eagle3, two other features",
        "eagle3, head of its own",
    ],
)
def test_eagles_own_code_takes_the_same_steps(scripts, target, name):
    drafter = make(name, target)
    ea_model = scripts.checkout.load_checkout(CHECKOUT)
    sizes = TREE["draft_depth"], TREE["draft_top_k"], TREE["draft_total_tokens"]
    eagle = scripts.checkout.EagleReference(ea_model, target, drafter, *sizes, longest=60)
    found = scripts.reference.compare(target, drafter, eagle, PROMPTS, 24, TREE)
    assert found["identical"] == len(PROMPTS)
    ours, theirs = found["methods"]["coral"], found["methods"]["eagle"]
    assert ours["steps"] == theirs["steps"] and ours["tokens_per_step"] == theirs["tokens_per_step"]
    assert ours["outside"]["operations"] < theirs["outside"]["operations"]
    assert ours["outside"]["waits"] < theirs["outside"]["waits"]
