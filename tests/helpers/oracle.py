"""A drafter whose proposals are right with a known probability, so that parity tests accept something."""

from contextlib import contextmanager

import torch

from coral_hf.drafter.draft_head import DraftHead
from coral_hf.generation.candidate_generator import CoralCandidateGenerator


@contextmanager
def oracle(continuation: torch.Tensor, probability: float = 0.7, seed: int = 0):
    """While active, draft logits put `continuation`'s true token first with `probability`, random decoys otherwise.

    A shortlist, a router or a head of the drafter's own still choose which tokens can be drafted at all.

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
        if self.router is None and self._listed is None:
            groups, ids = None, torch.arange(self.adapter.vocab_size)
            result = torch.randn(1, hidden.shape[1], ids.numel(), generator=generator)
        else:
            active, groups, _ = original_logits(self, hidden, weights)
            ids = self._token_ids(torch.arange(active.shape[-1]).expand(active.shape), groups)
            result = torch.randn(active.shape, generator=generator).masked_fill(active.isneginf(), float("-inf"))
        index = place["next"]
        place["next"] += 1
        if index < continuation.shape[1]:
            right = torch.rand((), generator=generator) < probability
            true = (ids == continuation[0, index]) & ~result.isneginf()
            result = result.masked_fill(true, 8.0 if right else 2.0)
        return result, groups, None

    DraftHead._active_logits, CoralCandidateGenerator.propose = logits, propose
    try:
        yield
    finally:
        DraftHead._active_logits, CoralCandidateGenerator.propose = original_logits, original_propose
