"""Refusals of `drafter/target_adapter.py`, when a drafter is made and when it is used."""

import tempfile
from functools import partial

import pytest
import torch
from helpers.refusals import Call, refusal
from helpers.tiny_models import COMMON, make_drafter, make_target
from helpers.unusual_targets import GEMMA_3N, PER_LAYER, build, needs
from transformers import AutoModel, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from coral_hf import CoralDraftModel
from coral_hf.drafter.target_adapter import resolve_target


make = CoralDraftModel.from_target


def _another():
    """A drafter is made for another target, and used."""
    return Call(make_target())()


@refusal("The active adapter of the target is a learnt prompt (")
def a_prompt_before_every_text(monkeypatch):
    peft = pytest.importorskip("peft")
    target = make_target()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(target, config).double().eval()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(make_target(), lora).double().eval()
    remedies = {
        "target.get_base_model()": lambda: Call(wrapped.get_base_model())(),
        "tune the target with LoRA": lambda: Call(tuned)(),
    }
    return partial(make, wrapped), remedies


@refusal("is an encoder-decoder; CORAL drafts for decoder-only causal LMs")
def encoder_decoder(monkeypatch):
    target = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4)
    )
    return Call(target, make_drafter(make_target())), {"load one of those": _another}


@refusal("carries several hidden states for each token (AltUp)")
def several_states(monkeypatch):
    needs("gemma3n_text")
    target = build("gemma3n_text", {**PER_LAYER, **GEMMA_3N})
    remedy = "choose another target (for example Gemma 3 or 4)"
    return partial(make, target), {remedy: lambda: Call(make_target("gemma3_text"))()}


@refusal("has no LM head; load it with AutoModelForCausalLM")
def no_head(monkeypatch):
    config = make_target().config
    remedies = {"load it with AutoModelForCausalLM": Call(AutoModelForCausalLM.from_config(config).double().eval())}
    return partial(make, AutoModel.from_config(config)), remedies


@refusal("without a weight tensor (of ")
def a_head_without_a_weight(monkeypatch):
    """A head of dynamic quantisation; quantised layers below the head are accepted."""
    target = make_target("qwen2", dtype=torch.float32)
    drafter, quantise = make_drafter(target), torch.ao.quantization.quantize_dynamic
    whole = quantise(target, {torch.nn.Linear}, dtype=torch.qint8)

    def below_the_head():
        target.model = quantise(target.model, {torch.nn.Linear}, dtype=torch.qint8)
        target.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=5, assistant_model=drafter)

    return Call(whole, drafter), {"leave lm_head out of the quantisation": below_the_head}


def _with_shortlist(target):
    drafter = make_drafter(target)
    drafter.add_shortlist(torch.arange(128), 64)
    return drafter


@refusal("has adapters beside its weight, whose rows alone would be scored ")
def adapters_on_the_head(monkeypatch):
    peft = pytest.importorskip("peft")
    target = make_target("qwen2")
    drafter = _with_shortlist(target)
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(target, lora).double().eval()
    call = Call(wrapped, drafter)

    def merged():
        wrapped.merge_adapter()
        call()
        wrapped.unmerge_adapter()

    whole = call.but(size={**call.size, "draft_head": "full"})
    return call, {"Merge the adapters (merge_adapter())": merged, "draft_head='full'": whole}


class _Codes(torch.Tensor):
    """Imitates a quantised weight: only its own module may multiply by it."""


@refusal(", of which single ")
def rows_of_codes(monkeypatch):
    target = make_target("qwen2")
    weight = target.lm_head.weight.detach()
    call = Call(target, _with_shortlist(target))
    target.lm_head.weight = torch.nn.Parameter(weight.as_subclass(_Codes), requires_grad=False)

    def whole():
        """Follows the message: drafts with the target it names, whose text equals plain `generate`'s."""
        call.but(size={**call.size, "draft_head": "full"})()

    def as_it_was():
        target.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        call()

    return call, {"draft_head='full'": whole, "load the target with an unquantised LM head": as_it_was}


def _of_another(**change):
    drafter = make_drafter(make_target())
    config = type(make_target().config)(**{**COMMON, **change})
    target = AutoModelForCausalLM.from_config(config).double().eval()
    target.generation_config.eos_token_id = None
    remedies = {
        "Load a drafter trained for this target": make_drafter(target),
        "train one with": make(target).double(),
    }
    remedies = {words: Call(target, suited.eval()) for words, suited in remedies.items()}
    return Call(target, drafter), remedies


@refusal("This drafter was made for a target with ")
def another_vocabulary(monkeypatch):
    return _of_another(vocab_size=256)


@refusal("This drafter was made for a target with ")
def another_width(monkeypatch):
    return _of_another(hidden_size=64)


@refusal("This drafter was made for a target with ")
def another_depth(monkeypatch):
    return _of_another(num_hidden_layers=2)


@refusal("This drafter was made for a target with ")
def another_family(monkeypatch):
    call = Call(make_target("qwen2"), make_drafter(make_target()))
    return call, {"CoralDraftModel.from_target(target)": Call(call.target)}


@refusal(": this family makes its logits in a way ")
def logits_made_otherwise(monkeypatch):
    target = make_target("qwen2")
    forward = target.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    monkeypatch.setattr(target, "forward", scaled)
    return partial(make, target), {"Choose another target": _another}


@refusal(" is a CORAL drafter: pass the causal LM that the drafter is for.")
def a_drafter_in_the_targets_place(monkeypatch):
    target = make_target()
    return partial(resolve_target, make_drafter(target)), {"pass the causal LM": lambda: resolve_target(target)}


@refusal(": pass a causal LM (AutoModelForCausalLM.from_pretrained(...)), or its path or Hub id.")
def what_is_no_model(monkeypatch):
    target, folder = make_target(), tempfile.mkdtemp()
    target.save_pretrained(folder)
    remedies = {"pass a causal LM": lambda: resolve_target(target), "or its path": lambda: resolve_target(folder)}
    return partial(resolve_target, 3), remedies


@refusal(" is not a folder here, and could not be loaded from the Hub: check the path, ")
def a_folder_that_is_not_there(monkeypatch):
    folder = tempfile.mkdtemp()
    make_target().save_pretrained(folder)
    return partial(resolve_target, f"{folder}/absent"), {"check the path": lambda: resolve_target(folder)}
