"""Targets with quantised weights draft as others do, with a drafter of the full-precision target.

bitsandbytes is installed by hand (`pip install bitsandbytes`, tried with 0.50.2 on a CPU).
"""

from types import SimpleNamespace

import pytest
import torch
from helpers.batches import compare_batch
from helpers.parity import TREES, compare, prompt_of
from helpers.tiny_models import make_drafter, make_target
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from coral_hf import coral_generate
from coral_hf.drafter.target_adapter import TargetAdapter


class WeightOnly(nn.Module):
    """Rows of 8-bit codes with a scale, multiplied in the dtype of the activations, as 4-bit formats do it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def quantised(family: str):
    """A tiny target in float64 whose linear layers below the LM head are quantised."""
    target = make_target(family)
    for module in list(target.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, WeightOnly(child))
    return target


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_quantised_weights_change_no_token(family):
    target = quantised(family)
    drafter, ids = make_drafter(make_target(family)), prompt_of(9)
    for tree in ("chain", "tree16"):
        assert compare(target, drafter, ids, TREES[tree])[1].n_accepted > 0
    assert not torch.allclose(target(ids).logits, make_target(family)(ids).logits)
    compare_batch(target, drafter, [9, 5], TREES["tree16"])
    assert TargetAdapter(target).has_rows  # for router, shortlist and low-rank head


def test_a_format_that_cannot_be_compiled_is_refused():
    target = make_target()
    target.hf_quantizer = SimpleNamespace(is_compileable=False)
    with pytest.raises(ValueError, match=r"weights quantised by SimpleNamespace .* Set draft_compile=False"):
        coral_generate(target, make_drafter(target), input_ids=prompt_of(9), max_new_tokens=4, draft_compile=True)


def loaded(folder, **settings):
    """A tiny target in float32, quantised by bitsandbytes."""
    make_target("qwen2", dtype=torch.float32).save_pretrained(folder)
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes_change_no_token(tmp_path, kind, tree):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    target = loaded(tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    assert isinstance(target.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    drafter = make_drafter(make_target("qwen2", dtype=torch.float32))
    _, stats = compare(target, drafter, prompt_of(20), TREES[tree], max_new_tokens=24)
    assert stats.n_accepted > 0


def test_eight_bits_of_bitsandbytes_draft(tmp_path):
    """They round activations to float16, so that equal tokens are not promised, as in half precision."""
    pytest.importorskip("bitsandbytes")
    target = loaded(tmp_path, load_in_8bit=True)
    drafter, ids = make_drafter(target), prompt_of(20)
    output = target.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=drafter)
    assert output.shape == (1, 44) and torch.equal(output[:, :20], ids) and drafter.last_stats.steps > 0
