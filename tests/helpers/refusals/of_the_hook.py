"""Refusals of `generation/hook.py`."""

import tempfile
from functools import partial

import torch
from helpers.parity import CHAIN, STOCK, prompt_of
from helpers.recurrent_targets import make_hybrid
from helpers.refusals import REFUSALS, Call, refusal
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from transformers import AutoModel, DynamicCache

from coral_hf import coral_generate
from coral_hf.generation import hook
from coral_hf.utils.compat import CACHE_NAME


OTHERS = {
    "num_assistant_tokens": 2,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 4,
    "target_lookbehind": 4,
    "assistant_ensemble_weight": 0.5,
    "assistant_early_exit": 2,
    "prompt_lookup_num_tokens": 4,
    "max_matching_ngram_size": 3,
    "use_mtp": True,
    "speculation_type": "dflash",
    "dola_layers": "high",
}
assert OTHERS.keys() == hook._WITHOUT_EFFECT.keys()
_NO_EFFECT = " has no effect with a CORAL drafter: "


def _setting_of_others(name, monkeypatch):
    call = Call(make_target(), settings={name: OTHERS[name]})
    without = call.but(settings={})
    remedy = hook._WITHOUT_EFFECT[name]
    if remedy == hook._SIZES:
        remedies = {remedy: without.but(size={"draft_depth": 2, "draft_top_k": 2, "draft_total_tokens": 5})}
    elif remedy == hook._OTHER_DRAFTS:
        remedies = {"drop it": without}
        if name == "prompt_lookup_num_tokens":  # the others ask for more than one setting, or for other models
            remedies["generate without a CORAL drafter"] = call.plain()
    else:
        remedies = {remedy: without.but(size={"draft_cost_aware": True})}

    def everywhere():
        setattr(call.target.generation_config, name, OTHERS[name])
        try:
            without()
        except ValueError:
            setattr(call.target.generation_config, name, None)
        without()

    return call, {**remedies, f"target.generation_config.{name} = None": everywhere}


for _name in OTHERS:
    REFUSALS[_name] = _NO_EFFECT, partial(_setting_of_others, _name)


@refusal("is the name of a drafter: load it first")
def a_name(monkeypatch):
    target, folder = make_target(), tempfile.mkdtemp()
    make_drafter(target).save_pretrained(folder)

    def loaded():
        Call(target, AutoModel.from_pretrained(folder, dtype=torch.float64).eval())()

    return Call(target, folder), {f"AutoModel.from_pretrained({folder!r})": loaded}


@refusal("Weights of the drafter are offloaded (on the meta device)")
def a_drafter_in_parts(monkeypatch):
    target, folder = make_target(), tempfile.mkdtemp()
    drafter = make_drafter(target)
    drafter.save_pretrained(folder)
    drafter.norm.to("meta")

    def load(**device_map):
        Call(target, AutoModel.from_pretrained(folder, dtype=torch.float64, **device_map).eval())()

    remedies = {"load it without device_map": load, 'device_map={"": 0}': lambda: load(device_map={"": "cpu"})}
    return Call(target, drafter), remedies


@refusal("synced_gpus=True: CORAL's ranks take different numbers of steps")
def ranks_that_wait(monkeypatch):
    call = Call(make_target(), drafted_only={"synced_gpus": True})
    return call, {"pass synced_gpus=False": call.but(drafted_only={"synced_gpus": False})}


@refusal("draft_stock_loop=True looks for stop_strings only at the end of a block")
def stop_strings_in_the_stock_loop(monkeypatch):
    settings, inputs = {"stop_strings": ["zzz"]}, {"tokenizer": make_tokenizer()}
    call = Call(make_target(), size=STOCK, settings=settings, inputs=inputs)
    return call, {"Leave draft_stock_loop=False": call.but(size=CHAIN), "drop stop_strings": call.but(settings={})}


@refusal("draft_stock_loop=True reads the whole prompt again after a prefilled cache")
def a_filled_cache_in_the_stock_loop(monkeypatch):
    target = make_target()

    def filled():
        cache = DynamicCache()
        target(prompt_of(12)[:, :8], use_cache=True, **{CACHE_NAME: cache})
        return cache

    call = Call(target, size=STOCK, inputs={CACHE_NAME: filled})
    return call, {"Leave draft_stock_loop=False": call.but(size=CHAIN), "drop the cache": call.but(inputs={})}


@refusal("CORAL drafts for greedy decoding and sampling, not for ")
def beams(monkeypatch):
    call = Call(make_target(), settings={"num_beams": 2})
    return call, {"Set num_beams=1": call.but(settings={"num_beams": 1}), "drop assistant_model": call.plain()}


@refusal("draft_stock_loop=True crops rejected drafts from the cache, and the recurrent layers of ")
def recurrent_layers_in_the_stock_loop(monkeypatch):
    call = Call(make_hybrid("qwen3_5_text"), size=STOCK)
    return call, {"Leave draft_stock_loop=False": call.but(size=CHAIN)}


def _generate(target, *args, **kwargs):
    sizes = {"draft_depth": 3, "draft_top_k": 2, "draft_total_tokens": 6}
    return coral_generate(target, *args, input_ids=prompt_of(12), max_new_tokens=6, **{**sizes, **kwargs})


@refusal(": CORAL cannot generate with it. Install transformers>=5.17,<6.")
def an_unknown_transformers(monkeypatch):
    target = make_target()

    def call(problem="GenerationMixin.x lacks y"):
        monkeypatch.setattr(hook, "_problem", problem)
        return _generate(target, make_drafter(target))

    return call, {"Install transformers>=5.17,<6": lambda: call(None)}


@refusal("coral_generate was given a tensor of shape ")
def ids_in_the_drafters_place(monkeypatch):
    target = make_target()
    remedy = "coral_generate(target, drafter, input_ids=...)"
    refused = partial(coral_generate, target, prompt_of(12))
    return refused, {remedy: lambda: _generate(target, make_drafter(target))}


@refusal(" drafts with a CORAL drafter, but was given ")
def another_assistant(monkeypatch):
    target, folder = make_target(), tempfile.mkdtemp()
    make_drafter(target).save_pretrained(folder)
    assistant = make_target(seed=1)
    plain = {"input_ids": prompt_of(12), "max_new_tokens": 6}
    remedies = {
        "AutoModel.from_pretrained(name)": lambda: _generate(target, AutoModel.from_pretrained(folder).double()),
        "any assistant_model": lambda: target.generate(**plain, assistant_model=assistant),
        "or none": lambda: target.generate(**plain),
    }
    return partial(_generate, target, assistant), remedies
