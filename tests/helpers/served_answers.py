"""Questions for servers of real engines, and the comparison of their greedy answers with plain `generate`'s."""

import torch


PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me three tips for staying healthy.",
    "What is the capital of France, and what is it known for?",
    "Explain how a bicycle stays upright.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "Write a short poem about the sea.",
    "List five animals that live in Africa.",
    "Translate 'good morning' into Spanish, French and German.",
    "Why is the sky blue?",
    "Write an email that asks for a day off.",
)
NEW_TOKENS = 32
# Two kernels may order two tokens differently where their float32 logits are this close.
NEAR_TIE = 1e-3


def new_ids(target, ids, **settings):
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    return target.generate(ids, attention_mask=mask, **settings)[0, ids.shape[1] :].tolist()


def explain(target, ids, expected, found):
    """Where two answers diverge, and the gap between the target's logits of the two tokens; None if they are equal.

    An answer that ends with an EOS may be shorter than the other one.
    """
    place = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        assert len(expected) == len(found), "one answer is the start of the other"
        return None
    with torch.no_grad():
        logits = target(torch.cat([ids, torch.tensor([expected[:place]])], dim=1).long()).logits[0, -1]
    return {"token": place, "gap": (logits[expected[place]] - logits[found[place]]).abs().item()}
