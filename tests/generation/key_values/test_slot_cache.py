"""The cache of regeneration, by hand: slots that move and are refilled, prefixes that are computed once."""

import pytest
import torch
from helpers.tiny_models import make_target

from coral_hf.generation.key_values.slot_cache import SlotCache


def test_slots_move_and_refill_by_hand(target):
    """Four prompts through three slots, one freed and refilled in the middle: logits equal those of full forwards."""
    prompts = [[20, 21, 22], [30], [40, 41, 42, 43, 44, 45, 46], [50, 51]]
    with torch.inference_mode():
        cache = SlotCache(target, 3)
        cache.prefill([0, 1, 2], prompts[:3])
        rows = [list(prompt) for prompt in prompts[:3]]
        for step in range(9):
            if step == 4:
                cache.move(2, 0)  # the last live slot goes to the free one
                cache.prefill([2], prompts[3:])
                rows = [rows[2], rows[1], list(prompts[3])]
            logits = cache.step(3)
            for slot, row in enumerate(rows):
                expected = target(torch.tensor([row])).logits[0, -1]
                assert torch.allclose(logits[slot], expected, atol=1e-10)
            cache.append(logits.argmax(-1))
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                row.append(token)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prefix_is_run_once(family, attention):
    """Prefixes shorter and longer than the window of 16; one prompt lacks the prefix, one consists of it."""
    target = make_target(family, attention=attention)
    atol = 1e-5 if attention == "eager" else 1e-10  # eager's softmax is float32
    for length in (5, 20):
        prefix = list(range(20, 20 + length))
        prompts = [[*prefix, 7, 9, 11], [*prefix, 50], [3, 4, 5], prefix, [*prefix, *range(60, 90)], [8]]
        with torch.inference_mode():
            cache = SlotCache(target, len(prompts))
            cache.share_prefix(prefix)
            cache.prefill(range(len(prompts)), prompts)
            for _ in range(3):
                logits = cache.step(len(prompts))
                for slot, prompt in enumerate(prompts):
                    expected = target(torch.tensor([prompt])).logits[0, -1]
                    assert torch.allclose(logits[slot], expected, atol=atol)
                    prompt.append(int(logits[slot].argmax()))
                cache.append(logits.argmax(-1))
