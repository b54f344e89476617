"""Refusals of `generation/key_values/dynamic.py`."""

import pytest
from helpers.parity import CHAIN, prompt_of
from helpers.recurrent_targets import make_hybrid
from helpers.refusals import TREE, Call, refusal
from helpers.tiny_models import make_target
from helpers.unusual_targets import CHAINS_ONLY, build, build_indexed, needs
from transformers import cache_utils

from coral_hf.utils.compat import CACHE_NAME


CHAINS = "Set draft_top_k=1 to verify "


def _indexed(family):
    needs(family)
    call = Call(build_indexed(family), ids=prompt_of(20))
    return call, {CHAINS: call.but(size=CHAIN)}


@refusal("for which no tree mask is known")
def deepseek_v32(monkeypatch):
    return _indexed("deepseek_v32")


@refusal("for which no tree mask is known")
def glm_moe_dsa(monkeypatch):
    return _indexed("glm_moe_dsa")


@refusal("for which no tree mask is known")
def axk2(monkeypatch):
    return _indexed("axk2")


@refusal("for which no tree mask is known")
def chunked(monkeypatch):
    call = Call(build("llama4_text", CHAINS_ONLY["llama4_text"]), ids=prompt_of(20))
    return call, {CHAINS: call.but(size=CHAIN)}


@refusal("This target has layers whose index cannot branch (")
def index_of_unnamed_layers(monkeypatch):
    """A cache of a target that does not name the types of its layers."""
    needs("deepseek_v32")
    target = build_indexed("deepseek_v32")
    monkeypatch.setattr("coral_hf.generation.call_checks.getattr", _without_layer_types, raising=False)
    call = Call(target, ids=prompt_of(20))
    return call, {CHAINS: call.but(size=CHAIN)}


def _without_layer_types(value, name, *default):
    return default[0] if name == "layer_types" else getattr(value, name, *default)


@refusal("which contains this target's states, cannot drop rejected drafts. ")
def convolutions_of_an_older_transformers(monkeypatch):
    target = make_hybrid("lfm2")
    mixin = next(c for c in cache_utils.LinearAttentionLayer.mro() if "activate_past_recording" in vars(c))
    call = Call(target, size=CHAIN)

    def older():
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(mixin, "activate_past_recording")
            call()

    return older, {"Generate without assistant_model": call.plain(), "install a newer Transformers": call}


@refusal("which contains this target's states, cannot drop rejected drafts. ")
def index_of_an_older_transformers(monkeypatch):
    """Its layers crop keys and values but not the index. Chains would be wrong, and trees do not use it."""
    needs("deepseek_v32")
    call = Call(build_indexed("deepseek_v32"), ids=prompt_of(20), size=TREE)

    def older():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_utils.DynamicIndexedLayer, "crop", cache_utils.DynamicLayer.crop)
            call()

    return older, {
        "Generate without assistant_model": call.plain(),
        "install a newer Transformers": call.but(size=CHAIN),
    }


@refusal("CORAL verifies drafts in a dynamic cache, not in ")
def static_cache(monkeypatch):
    target = make_target()
    passed = {CACHE_NAME: lambda: cache_utils.StaticCache(config=target.config, max_cache_len=64)}
    call = Call(target, inputs=passed)
    return call, {
        "pass a DynamicCache": call.but(inputs={CACHE_NAME: lambda: cache_utils.DynamicCache(config=target.config)})
    }


@refusal("CORAL verifies drafts in a dynamic cache, not in ")
def static_index(monkeypatch):
    needs("deepseek_v32")
    target = build_indexed("deepseek_v32")
    call = Call(target, ids=prompt_of(20), size=CHAIN, settings={"cache_implementation": "static"})
    return call, _dynamic(call)


def _dynamic(call):
    config = call.target.config
    passed = {CACHE_NAME: lambda: cache_utils.DynamicCache(config=config)}
    return {
        "Remove cache_implementation": call.but(settings={}),
        "pass a DynamicCache": call.but(settings={}, inputs=passed),
    }
