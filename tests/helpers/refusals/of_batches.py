"""Refusals of batches in `generation/call_checks.py`."""

from helpers.batches import padded
from helpers.parity import STOCK
from helpers.refusals import Call, refusal
from helpers.tiny_models import make_target
from helpers.unusual_targets import CHAINS_ONLY, build


def call_of(lengths, target=None, **changes) -> Call:
    ids, mask = padded(lengths)
    return Call(target or make_target(), ids=ids, inputs={"attention_mask": mask}, **changes)


def one_by_one(call: Call):
    """The prompts of a call, each alone and without its padding."""

    def run():
        for ids, mask in zip(call.ids, call.inputs["attention_mask"], strict=True):
            call.but(ids=ids[mask.bool()][None], inputs={})()

    return run


@refusal("draft_stock_loop=True drafts for one sequence; got a batch of ")
def stock_loop(monkeypatch):
    call = call_of([5, 9], size=STOCK)
    return call, {"Leave draft_stock_loop=False": call_of([5, 9]), "call generate once per prompt": one_by_one(call)}


@refusal(" of the batch is empty: its attention mask is 0 everywhere")
def empty_prompt(monkeypatch):
    return call_of([5, 0, 9]), {"Leave it out": call_of([5, 9])}


@refusal(" of the batch has padding, or a hole in its attention mask, after its first token")
def right_padding(monkeypatch):
    call = call_of([5, 9])
    flipped = call.but(ids=call.ids.flip(1), inputs={"attention_mask": call.inputs["attention_mask"].flip(1)})
    return flipped, {"Pad on the left": call}


@refusal("CORAL cannot draft for a batch of ")
def chunked_attention(monkeypatch):
    target = build("llama4_text", CHAINS_ONLY["llama4_text"], "sdpa")
    call = call_of([5, 5], target, size={"draft_depth": 3, "draft_top_k": 1})
    plain = call_of([5, 5], target).plain()
    return call, {"Call generate once per prompt": one_by_one(call), "without assistant_model": plain}
