"""Sampling in batches: the exact distribution of enumerated texts, and rows that are independent of each other."""

from itertools import product

import pytest
import torch
from helpers.parity import CHAIN, config_of
from helpers.tiny_models import COMMON, make_drafter
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from coral_hf.generation.tokens.token_choice import TokenChoice


VOCAB, NEW, ROWS = 5, 3, 4000
TREE = {"draft_depth": 3, "draft_top_k": 2, "draft_total_tokens": 8}
PROMPTS = torch.tensor([[4, 1, 3, 2], [0, 0, 2, 4]])  # the second is padded by two
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
WARPED = {"temperature": 1.5, "top_k": 4}


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    sizes = {**COMMON, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1}
    target = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).double().eval()
    target.generation_config.eos_token_id = None
    return target, make_drafter(target)


def sampled(pair, size, seed=0):
    """New tokens `[ROWS, NEW]` of the two prompts in turns, all in one batch."""
    target, drafter = pair
    ids, mask = PROMPTS.repeat(ROWS // 2, 1), MASK.repeat(ROWS // 2, 1)
    set_seed(seed)
    config = config_of(size, do_sample=True, max_new_tokens=NEW, **WARPED)
    output = target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=drafter)
    assert drafter.last_stats.n_accepted > ROWS / 10
    return output[:, 4:]


def chances(target, prompt) -> torch.Tensor:
    """The probability of every text of `NEW` tokens, `[VOCAB ** NEW]`, by a forward over each."""
    texts = torch.tensor(list(product(range(VOCAB), repeat=NEW)))
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(len(texts), -1), texts], dim=1)).logits[:, len(prompt) - 1 : -1]
    logits = logits.float() / WARPED["temperature"]
    logits = logits.masked_fill(logits < logits.topk(WARPED["top_k"]).values[..., -1:], -torch.inf)
    return logits.softmax(-1).gather(2, texts[..., None]).prod(dim=1)[:, 0]


def excess(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square over its value at p = 0.001 (Wilson and Hilferty); rare outcomes are one."""
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (counts, expected))
    found = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = (expected > 0).sum() - 1
    return float(found / (freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)).sqrt()) ** 3))


def worst_text(pair, tokens) -> float:
    """The excess of the texts of the prompt that fits worse."""
    place = (tokens * torch.tensor([VOCAB**power for power in reversed(range(NEW))])).sum(dim=1)
    found = []
    for row, prompt in enumerate(PROMPTS):
        counts = place[row::2].bincount(minlength=VOCAB**NEW).double()
        found.append(excess(counts, chances(pair[0], prompt[MASK[row].bool()]) * ROWS / 2))
    return max(found)


def worst_neighbours(tokens) -> float:
    """The excess of the second tokens of two neighbouring rows over those of independent rows."""
    first, second = tokens[0::2, 1], tokens[1::2, 1]
    joint = (first * VOCAB + second).bincount(minlength=VOCAB**2).double()
    single = [x.bincount(minlength=VOCAB).double() / len(x) for x in (first, second)]
    return excess(joint, (single[0][:, None] * single[1]).flatten() * len(first))


@pytest.mark.slow
@pytest.mark.parametrize("size", [CHAIN, TREE], ids=["chain", "tree"])
def test_texts_have_the_targets_chances(pair, size):
    tokens = sampled(pair, size)
    assert worst_text(pair, tokens) < 1 and worst_neighbours(tokens) < 1


def test_a_rule_that_reads_the_logits_of_another_node_is_found(pair, monkeypatch):
    choose = TokenChoice._choose
    monkeypatch.setattr(
        TokenChoice, "_choose", lambda self, rows, nodes, logits: choose(self, rows, [0] * len(nodes), logits)
    )
    assert worst_text(pair, sampled(pair, TREE)) > 1


def test_rows_that_share_their_random_numbers_are_found(pair, monkeypatch):
    """Two neighbouring rows, each token with the right probability."""

    def shared(chances, num_samples):
        drawn = torch.rand((len(chances) + 1) // 2).repeat_interleave(2)[: len(chances), None]
        return (chances.cumsum(-1) < drawn).sum(dim=-1, keepdim=True).clamp(max=VOCAB - 1)

    monkeypatch.setattr(torch, "multinomial", shared)
    assert worst_neighbours(sampled(pair, TREE)) > 1
