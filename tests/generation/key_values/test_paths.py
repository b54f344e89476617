"""The targets and calls that use the key-value store, and the page that lists them."""

from pathlib import Path

import pytest
import torch
from helpers.parity import CHAIN, TREES, compare, config_of, prompt_of
from helpers.tiny_models import FAMILIES, make_drafter, make_target
from helpers.unusual_targets import CHAINS_ONLY, POSITIONLESS, build, build_positionless
from transformers import DynamicCache

from coral_hf.generation.key_values.paths import OF_CALLS, OF_TARGETS, layer_windows, store_obstacle, target_obstacle
from coral_hf.generation.key_values.store import KeyValueStore
from coral_hf.utils.compat import cache_kwarg


DOCS = Path(__file__).parents[3] / "docs" / "batches.md"


def test_the_docs_list_both_tables():
    listed = [
        line[2:].strip() for line in DOCS.read_text().split("## Which cache")[1].splitlines() if line[:2] == "- "
    ]
    assert listed == [*OF_TARGETS, *OF_CALLS]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_ordinary_family_goes_into_the_store(family, monkeypatch):
    target, begun = make_target(family), []
    begin = KeyValueStore.begin
    monkeypatch.setattr(KeyValueStore, "begin", lambda store, count: begun.append(count) or begin(store, count))
    assert target_obstacle(target) is None
    target.generate(prompt_of(9), generation_config=config_of(CHAIN), assistant_model=make_drafter(target))
    assert begun
    expected = [
        layer.sliding_window if layer.is_sliding else None for layer in DynamicCache(config=target.config).layers
    ]
    assert layer_windows(target) == expected


@pytest.mark.parametrize("family", [*CHAINS_ONLY, *POSITIONLESS])
def test_others_stay_in_the_dynamic_cache(family):
    target = build(family, CHAINS_ONLY[family]) if family in CHAINS_ONLY else build_positionless(family)
    assert target_obstacle(target) is not None


def test_calls_that_stay_in_the_dynamic_cache(target):
    cache, mask = DynamicCache(config=target.config), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert store_obstacle(target, cache, mask, 20) is store_obstacle(target, cache, None, 20) is None
    assert "left padding" in store_obstacle(target, cache, mask.flip(1), 20)
    assert "left padding" in store_obstacle(target, cache, torch.tensor([[1, 0, 1]]), 20)
    assert "OffloadedCache" in store_obstacle(target, type("OffloadedCache", (DynamicCache,), {})(), None, 20)
    target(prompt_of(3), use_cache=True, **cache_kwarg(cache))
    assert "passes its own KV cache" in store_obstacle(target, cache, None, 20)
    target.config.rope_parameters = {**target.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    assert "RoPE" in store_obstacle(target, DynamicCache(config=target.config), None, 513)
    assert store_obstacle(target, DynamicCache(config=target.config), None, 512) is None


@pytest.mark.parametrize("size", [CHAIN, TREES["tree16"]], ids=["chain", "tree"])
def test_a_mask_with_a_hole(target, size):
    """One sequence, in the dynamic cache."""
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    compare(target, make_drafter(target), prompt_of(12), size, attention_mask=mask)
