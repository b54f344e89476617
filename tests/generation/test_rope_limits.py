"""If RoPE changes its frequencies within a text, no draft crosses that place, as in plain single steps."""

import pytest
import torch
from helpers.parity import TREES, compare, phi3_restarts, prompt_of
from helpers.tiny_models import COMMON, make_drafter
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 32}
ROPES = {
    "dynamic": ("llama", {"max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "longrope": ("llama", {"max_position_embeddings": 128, "rope_parameters": LONG}),
    "phi3": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONG}),
    "phi3 of one kind": ("phi3", {"original_max_position_embeddings": 32}),
}

kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=phi3_restarts) if ROPES[kind][0] == "phi3" else kind for kind in ROPES]
)


def build(kind: str):
    family, settings = ROPES[kind]
    torch.manual_seed(0)
    settings = {**COMMON, **settings}
    if "rope_parameters" in settings:
        settings["rope_parameters"] = {"rope_theta": 1e4, **settings["rope_parameters"]}
    target = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).double().eval()
    target.generation_config.eos_token_id = None
    return target


# around the limits of 32 and 48, and what lies further from them
lengths = pytest.mark.parametrize(
    "lengths", [(20, 31, 33, 47), pytest.param((9, 29, 32, 60, 47), marks=pytest.mark.exhaustive)], ids=["near", "far"]
)


@pytest.mark.parametrize("tree", [pytest.param("chain", marks=pytest.mark.slow), "tree16"])
@lengths
@kinds
def test_texts_that_cross_the_limit(kind, tree, lengths):
    """From below, just below, at and beyond it."""
    target = build(kind)
    drafter = make_drafter(target)
    # A prompt beyond it turns by what the call before left in a dynamic RoPE: plain generate repeats no such text.
    for length in lengths if kind != "dynamic" else [length for length in lengths if length < 48]:
        _, stats = compare(target, drafter, prompt_of(length), TREES[tree], 0.9)
        assert kind == "dynamic" or stats.n_accepted > stats.steps / 2
    # beyond the limit it turns every token by other frequencies: single steps
    assert kind != "dynamic" or (stats.steps == 39 and stats.n_accepted == 0)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [pytest.param("chain", marks=pytest.mark.exhaustive), "tree16"])
@kinds
def test_padded_texts_that_cross_the_limit(kind, tree):
    target, padding = build(kind), 5
    drafter = make_drafter(target)
    for length in (20, 24, 27, 30):
        ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), prompt_of(length)], dim=1)
        mask = (torch.arange(length + padding) >= padding).long()[None]
        compare(target, drafter, ids, TREES[tree], 0.9, attention_mask=mask)
