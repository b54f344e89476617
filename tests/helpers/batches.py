"""Batches of prompts, padded on the left, and their comparison with and without a drafter."""

import torch
from helpers.parity import compare


def padded(lengths: list[int], seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths and their attention mask, both `[B, L]`."""
    longest, generator = max(lengths), torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, 128, (length,), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids, mask


def compare_batch(target, drafter, lengths, tree, probability=0.8, **settings):
    """[`compare`] of a batch with prompts of these lengths; asserts that every row has accepted drafts."""
    ids, mask = padded(lengths)
    plain, stats = compare(target, drafter, ids, tree, probability, attention_mask=mask, **settings)
    assert len(stats.rows) == len(plain) and sum(row.steps for row in stats.rows) == stats.steps
    assert sum(row.n_accepted for row in stats.rows) == stats.n_accepted
    return plain, stats
