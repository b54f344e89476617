"""A drafter whose proposals are right with a known probability, so that parity tests accept something."""

from contextlib import contextmanager

import torch

from coral_hf.drafter.draft_head import DraftHead
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.slot_drafts import SlotDrafts


def row_of(ids: torch.Tensor, continuations: torch.Tensor) -> int | None:
    """Which of `continuations` `[B, L]` begins with `ids` `[l]`."""
    same = (continuations[:, : len(ids)] == ids[: continuations.shape[1]]).all(dim=1).nonzero().flatten().tolist()
    return same[0] if same else None


@contextmanager
def oracle(continuation: torch.Tensor, probability: float = 0.7, seed: int = 0):
    """While active, draft logits put `continuation`'s true token first with `probability`, random decoys otherwise.

    Every head but the full one still chooses which tokens can be drafted at all.

    Args:
        continuation (`torch.LongTensor` of shape `[B, L]`): the whole sequences that plain decoding produces; a row that is
            drafted for is found among them by its text so far.
    """
    generator = torch.Generator().manual_seed(seed)
    original_logits, original_propose = DraftHead._active_logits, CoralCandidateGenerator.propose
    original_of_slots = SlotDrafts._propose
    place = {}

    def propose_for_slots(self, texts, depth, rule):
        rows = [row_of(torch.tensor(text), continuation) for text in texts]
        place.update(level=0, next=[len(text) for text in texts], rows=rows)
        return original_of_slots(self, texts, depth, rule)

    def propose(self, input_ids, features, max_depth=None, lengths=None, counts=None, *others):
        place["level"] = 0
        place["next"] = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths
        if len(continuation) == 1:
            place["rows"] = [0] * len(input_ids)
        else:
            texts = zip(input_ids, place["next"], strict=True)
            place["rows"] = [row_of(row[:length], continuation) for row, length in texts]
        return original_propose(self, input_ids, features, max_depth, lengths, counts, *others)

    def logits(self, hidden, weights):
        # One call per level: level d drafts the token at index `next + d`.
        if self.router is None and self._listed is None and self.low_rank is None:
            groups, ids = None, torch.arange(self.adapter.vocab_size)
            result = torch.randn(*hidden.shape[:2], ids.numel(), generator=generator)
        else:
            active, groups, _ = original_logits(self, hidden, weights)
            ids = self._token_ids(torch.arange(active.shape[-1]).expand(active.shape), groups)
            result = torch.randn(active.shape, generator=generator).masked_fill(active.isneginf(), float("-inf"))
        for index, (row, start) in enumerate(zip(place["rows"], place["next"], strict=True)):
            column = start + place["level"]
            if row is not None and column < continuation.shape[1]:
                right = torch.rand((), generator=generator) < probability
                scored = ids if ids.ndim == 1 else ids[index : index + 1]
                true = (scored == continuation[row, column]) & ~result[index : index + 1].isneginf()
                result[index : index + 1] = result[index : index + 1].masked_fill(true, 8.0 if right else 2.0)
        place["level"] += 1
        return result, groups, None

    DraftHead._active_logits, CoralCandidateGenerator.propose = logits, propose
    SlotDrafts._propose = propose_for_slots
    try:
        yield
    finally:
        DraftHead._active_logits, CoralCandidateGenerator.propose = original_logits, original_propose
        SlotDrafts._propose = original_of_slots
