"""The full product: families x attention x chain and trees x processors, each with a random and an oracle drafter."""

import itertools

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, config_of, prompt_of
from helpers.tiny_models import FAMILIES, make_drafter, make_target
from transformers import set_seed

from coral_hf.utils.compat import cache_of


pytestmark = pytest.mark.slow


PROCESSORS = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[7], [9, 11]]},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(3, 40))},
}
SAMPLING = {
    "temperature": {"temperature": 1.4, "top_k": 0},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "top_k": {"top_k": 7},
    "min_p": {"min_p": 0.05, "top_k": 0},
    "processors": {"temperature": 0.8, "top_k": 30, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}
NEW_TOKENS = 20
ALL_TREES = {
    **TREES,
    "lookup16": {**TREES["tree16"], "draft_lookup": True},
    "lookup chain": {**CHAIN, "draft_lookup": True},
}


def run(target, ids, assistant=None, tree=None, **settings):
    set_seed(0)
    config = config_of(tree or {}, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, **settings)
    return target.generate(ids, generation_config=config, assistant_model=assistant)


def assert_same(drafted, plain, cell: str) -> None:
    """Tokens and the whole KV cache: a wrong mask, position or row shows there before it changes a token."""
    assert torch.equal(drafted.sequences, plain.sequences), cell
    for ours, theirs in zip(cache_of(drafted).layers, cache_of(plain).layers, strict=True):
        for name in ("keys", "values"):
            # norms go through float32 whatever the target's dtype
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4, msg=cell)


def assert_cells(family: str, attention: str, cells: dict[str, dict]) -> None:
    """Every tree for every setting; prompts of 6 (below the sliding window of 16) and 24 tokens take turns."""
    target = make_target(family, attention=attention)
    drafter = make_drafter(target, shape="eagle3" if attention == "sdpa" else "eagle")
    accepted = dict.fromkeys(ALL_TREES, 0)
    steps = dict(accepted)
    for (index, (name, settings)), length in itertools.product(enumerate(cells.items()), (6, 24)):
        ids = prompt_of(length, seed=index)
        plain = run(target, ids, **settings)
        for tree, sizes in ALL_TREES.items():
            cell = f"{family} {attention} {name} {tree} prompt {length}"
            assert_same(run(target, ids, drafter, sizes, **settings), plain, f"random drafts: {cell}")
            with oracle(plain.sequences, 0.85, seed=index):
                assert_same(run(target, ids, drafter, sizes, **settings), plain, f"oracle drafts: {cell}")
            accepted[tree] += drafter.last_stats.n_accepted
            steps[tree] += drafter.last_stats.steps
    for tree in ALL_TREES:
        assert accepted[tree] / steps[tree] >= 1.5, tree


def marked(family: str, *other: str):
    """CI takes two families, with and without a sliding window. `test_lossless.py` takes all with fewer settings."""
    in_ci = family in ("gemma3_text", "qwen3") and "eager" not in other
    return pytest.param(family, *other, marks=[] if in_ci else pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("family", "attention"),
    [marked(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")],
)
def test_greedy(family, attention):
    assert_cells(family, attention, PROCESSORS)


@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
def test_sampling(family):
    assert_cells(family, "sdpa", {name: {"do_sample": True, **settings} for name, settings in SAMPLING.items()})
