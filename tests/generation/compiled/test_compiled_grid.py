"""The greedy grid of `test_lossless_grid.py` under `draft_compile`, with the backend "eager"."""

import itertools

import pytest
import torch
from helpers.graphs import graph_oracle, graphed
from helpers.parity import TREES, config_of, prompt_of
from helpers.tiny_models import FAMILIES, make_drafter, make_target
from torch._dynamo.utils import counters

from coral_hf.utils.compat import cache_of


pytestmark = pytest.mark.slow

PROCESSORS = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[7], [9, 11]]},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(3, 40))},
}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(
            family,
            attention,
            marks=[] if (family, attention) == ("gemma3_text", "sdpa") else pytest.mark.exhaustive,
        )
        for family in FAMILIES
        for attention in ("sdpa", "eager")
    ],
)
def test_greedy(family, attention):
    """Tokens and the whole KV cache; for each tree two graphs serve all settings and both prompts."""
    target = make_target(family, attention=attention)
    drafter = make_drafter(target, shape="eagle3" if attention == "sdpa" else "eagle")
    wanted = {"max_new_tokens": 20, "return_dict_in_generate": True}
    for tree, sizes in TREES.items():
        counters.clear()
        accepted = steps = 0
        for (index, (name, settings)), length in itertools.product(enumerate(PROCESSORS.items()), (6, 24)):
            ids, cell = prompt_of(length, seed=index), f"{family} {attention} {name} {tree} prompt {length}"
            plain = target.generate(ids, generation_config=config_of({}, **wanted, **settings))
            with torch._dynamo.config.patch(error_on_recompile=True), graph_oracle(plain.sequences, 0.85, seed=index):
                config = graphed(sizes, **wanted, **settings)
                found = target.generate(ids, generation_config=config, assistant_model=drafter)
            assert torch.equal(found.sequences, plain.sequences), cell
            for ours, theirs in zip(cache_of(found).layers, cache_of(plain).layers, strict=True):
                for states in ("keys", "values"):
                    ours_, theirs_ = getattr(ours, states), getattr(theirs, states)
                    torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-4, msg=cell)
            accepted, steps = accepted + drafter.last_stats.n_accepted, steps + drafter.last_stats.steps
        assert accepted / steps >= 1, tree
        # a graph of the target for each size that trees are padded to is kept from tree to tree
        assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
