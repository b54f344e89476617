"""Batches of targets with recurrent layers: each prompt gets plain `generate`'s text, with removed and waiting rows."""

import json

import pytest
import torch
from helpers.recurrent_targets import make_hybrid
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf.generation.key_values.padded_batch import PaddedBatch, decoding_slots
from coral_hf.generation.key_values.slot_cache import SlotCache
from coral_hf.responses.regenerate import regenerate


EOS_IDS = list(range(2, 14))
PROMPTS = [{"id": f"p{i}", "turns": ["abcdefghij"[: 1 + 3 * i % 10], "k" * (1 + i % 3)]} for i in range(7)]


def plain(target, prompt_ids):
    output = target.generate(torch.tensor([prompt_ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    return output[0, len(prompt_ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen3_5_text", *(pytest.param(f, marks=pytest.mark.slow) for f in ("jamba", "lfm2"))]
)
def test_answers_are_plain_generates(family, tmp_path):
    target = make_hybrid(family, attention="sdpa")  # eager attention is NaN at padding in float64
    target.generation_config.eos_token_id = EOS_IDS
    output = tmp_path / "out.jsonl"
    stats = regenerate(target, make_tokenizer(), PROMPTS, output, max_new_tokens=20, slots=3, progress=False)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert stats["n_responses"] == len(rows) == 14
    for row in rows:
        assert row["response_ids"] == plain(target, row["prompt_ids"])
    assert len({len(row["response_ids"]) for row in rows}) > 2, "rows that end together do not test the batch"


def test_it_is_said_once(caplog):
    target = make_hybrid("qwen3_5_text")
    kinds = {type(decoding_slots(target, 3)) for _ in range(3)}
    assert kinds == {PaddedBatch} and type(decoding_slots(make_target(), 3)) is SlotCache
    assert sum("padded batches of up to 3" in message for message in caplog.messages) == 1


def test_a_drafter_is_refused(tmp_path):
    target, output = make_hybrid("qwen3_5_text"), tmp_path / "out.jsonl"
    settings = {"drafter": make_drafter(target), "max_new_tokens": 20, "progress": False}
    with pytest.raises(ValueError, match="recurrent layers of Qwen3_5ForCausalLM: leave the drafter out"):
        regenerate(target, make_tokenizer(), PROMPTS, output, **settings)
    assert not output.exists()
