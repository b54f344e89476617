"""One call of `generate` without a drafter, and with one whose drafts are mostly right."""

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, config_of
from transformers import set_seed

from coral_hf.utils.compat import CACHE_NAME


DRAFTS = {"chain": CHAIN, "tree": TREES["tree16"]}
drafts = pytest.mark.parametrize("draft", list(DRAFTS))


def both(model, drafter, draft, ids, probability=0.9, cache=None, **settings):
    """Plain and drafted outputs of one call, the drafts mostly right; asserts equal ids and accepted tokens."""
    extra = {key: settings.pop(key) for key in ("attention_mask", "tokenizer", "position_ids") if key in settings}

    def run(size, **assistant):
        if cache is not None:
            extra[CACHE_NAME] = cache()
        set_seed(0)
        return model.generate(input_ids=ids, generation_config=config_of(size, **settings), **extra, **assistant)

    plain = run({})
    sequences = getattr(plain, "sequences", plain)
    with oracle(sequences, probability):
        drafted = run(DRAFTS[draft], assistant_model=drafter)
    assert torch.equal(sequences, getattr(drafted, "sequences", drafted))
    assert drafter.last_stats.n_accepted > 0
    return plain, drafted
