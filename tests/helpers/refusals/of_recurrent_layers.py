"""Refusals of `generation/key_values/recurrent_layers.py`."""

import copy

import torch
from helpers.parity import CHAIN
from helpers.recurrent_targets import make_hybrid
from helpers.refusals import TREE, Call, refusal
from helpers.unusual_targets import RECURRENT, build
from transformers import DynamicCache

from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.utils.compat import CACHE_NAME


@refusal(" recurrent layers keep their states in it. Pass ")
def a_cache_of_no_config(monkeypatch):
    call = Call(make_hybrid("qwen3_5_text"), size=CHAIN, inputs={CACHE_NAME: lambda: DynamicCache()})
    config = call.target.config
    made = {CACHE_NAME: lambda: DynamicCache(config=config)}
    return call, {"DynamicCache(config=target.config)": call.but(inputs=made)}


def _plain_alone(family):
    target = build(family, RECURRENT[family])
    drafter = CoralDraftModel(CoralDraftConfig.from_target(target.config)).double()
    call = Call(target, drafter, size=CHAIN)
    return call, {"Generate without assistant_model": call.plain()}


@refusal(": rejected drafts cannot be dropped from it. Generate without assistant_model.")
def no_attention(monkeypatch):
    return _plain_alone("mamba")


@refusal(": rejected drafts cannot be dropped from it. Generate without assistant_model.")
def states_elsewhere(monkeypatch):
    return _plain_alone("recurrent_gemma")


@refusal(" is compiled, and its recurrent layers read the levels of a draft ")
def compiled(monkeypatch):
    target = make_hybrid("qwen3_5_text")
    forward = target.forward
    call = Call(target, size=CHAIN)

    def of_the_compiled():
        target.forward = torch.compile(forward, backend="eager")
        try:
            call()
        finally:
            del target.forward

    return of_the_compiled, {"the uncompiled target": call, "without assistant_model": call.plain()}


@refusal("One module must write them, on its own device and ")
def a_wrapped_module(monkeypatch):
    """Wrapped as by Accelerate when it is offloaded."""
    target = make_hybrid("qwen3_5_text")
    module = target.model.layers[0].linear_attn
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    call = Call(target, size=CHAIN)
    return call, {"Generate without assistant_model": call.plain()}


@refusal("One module must write them, on its own device and ")
def two_modules_of_a_layer(monkeypatch):
    """A target whose states can be cropped, so that chains need not read level by level."""
    target = make_hybrid("lfm2")
    target.model.layers[0].another = copy.deepcopy(target.model.layers[0].conv)
    call = Call(target, size=TREE)
    return call, {"Set draft_top_k=1 to verify chains": call.but(size=CHAIN)}
