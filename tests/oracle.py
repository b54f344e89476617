"""A drafter whose proposals are right with a known probability, so that parity tests accept something."""

from contextlib import contextmanager

import torch

from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.lm_head_router import DraftHead


@contextmanager
def oracle(continuation: torch.Tensor, probability: float = 0.7, seed: int = 0):
    """While active, draft logits put `continuation`'s true token first with `probability`, random decoys otherwise.

    Args:
        continuation (`torch.LongTensor` of shape `[1, L]`): the whole sequence that plain decoding produces.
    """
    generator = torch.Generator().manual_seed(seed)
    original_logits, original_propose = DraftHead._active_logits, CoralCandidateGenerator.propose
    place = {}

    def propose(self, input_ids, features, max_depth=None):
        place["next"] = input_ids.shape[1]
        return original_propose(self, input_ids, features, max_depth)

    def logits(self, hidden, weights):
        # One call per level: level d drafts the token at index `next + d`.
        result = torch.randn(1, hidden.shape[1], self.adapter.vocab_size, generator=generator)
        index = place["next"]
        place["next"] += 1
        if index < continuation.shape[1]:
            right = torch.rand((), generator=generator) < probability
            result[..., continuation[0, index]] = 8.0 if right else 2.0
        return result, None, None

    DraftHead._active_logits, CoralCandidateGenerator.propose = logits, propose
    try:
        yield
    finally:
        DraftHead._active_logits, CoralCandidateGenerator.propose = original_logits, original_propose
