"""Trees, prompts and settings for calls of `generate`, and their comparison with and without a drafter."""

import inspect

import pytest
import torch
from helpers.oracle import oracle
from transformers import GenerationConfig, Phi3ForCausalLM, set_seed
from transformers.generation.streamers import BaseStreamer

from coral_hf.generation.statistics import DraftStats
from coral_hf.utils.compat import cache_kwarg


CHAIN = {"draft_depth": 5, "draft_top_k": 1}
TREES = {
    "chain": CHAIN,
    "tree8": {"draft_depth": 3, "draft_top_k": 3, "draft_total_tokens": 8},
    "tree16": {"draft_depth": 4, "draft_top_k": 4, "draft_total_tokens": 16},
    "tree32": {"draft_depth": 5, "draft_top_k": 4, "draft_total_tokens": 32},
    "tree60": {"draft_depth": 6, "draft_top_k": 10, "draft_total_tokens": 60},
}
STOCK = {"draft_depth": 5, "draft_top_k": 1, "draft_stock_loop": True}


# Transformers 5.17's Phi-3, where it drops its cache, reads the last token alone: plain text is wrong there.
phi3_restarts = pytest.mark.skipif(
    "next_sequence_length" not in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation),
    reason="this Transformers release's Phi-3 loses its prompt at the length where it drops its cache",
)


def prompt_of(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def config_of(tree: dict, **settings) -> GenerationConfig:
    config = GenerationConfig(**{"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **settings})
    for key, value in tree.items():
        setattr(config, key, value)
    return config


class Recorder(BaseStreamer):
    """A streamer that keeps every `put` and counts the calls of `end`."""

    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1

    @property
    def tokens(self) -> list[int]:
        return [token for put in self.puts for token in put]


def compare(target, drafter, ids, tree, probability=0.7, **settings):
    """Plain and CORAL outputs for one setting; returns the plain output and the statistics of an oracle run."""
    extra = {key: settings.pop(key) for key in ("attention_mask", "tokenizer") if key in settings}
    set_seed(0)
    plain = target.generate(ids, generation_config=config_of({}, **settings), **extra)
    set_seed(0)
    random_drafts = target.generate(
        ids, generation_config=config_of(tree, **settings), assistant_model=drafter, **extra
    )
    assert torch.equal(plain, random_drafts)
    with oracle(plain, probability):
        set_seed(0)
        oracle_drafts = target.generate(
            ids, generation_config=config_of(tree, **settings), assistant_model=drafter, **extra
        )
    assert torch.equal(plain, oracle_drafts)
    return plain, drafter.last_stats


def assert_refused(target, drafter, size: dict, message: str, ids=None, cache=None, mask=None, **settings) -> None:
    """A `ValueError` before any forward of target and drafter, which are unchanged."""
    calls = []
    modules = (target, target.get_decoder(), drafter.layer)
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in modules]
    drafter.last_stats = before = DraftStats(steps=3)

    def state():
        hooks = [
            [len(m._forward_hooks), len(m._forward_pre_hooks)] for model in (target, drafter) for m in model.modules()
        ]
        configs = [target.config.to_dict(), target.generation_config.to_dict(), drafter.config.to_dict()]
        return hooks, configs, target.config.get_text_config()._attn_implementation, target.training, drafter.training

    old = state()
    extra = {} if cache is None else cache_kwarg(cache)
    extra |= {} if mask is None else {"attention_mask": mask}
    with pytest.raises(ValueError, match=message):
        config = config_of(size, **settings)
        ids = prompt_of(20) if ids is None else ids
        target.generate(ids, generation_config=config, assistant_model=drafter, **extra)
    assert not calls and state() == old and drafter.last_stats is before and before == DraftStats(steps=3)
    for handle in handles:
        handle.remove()
