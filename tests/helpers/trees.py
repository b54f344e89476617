"""Draft trees written out by hand, and a target that has read its prompt."""

import torch
from transformers import DynamicCache

from coral_hf.generation.draft_tree import DraftTree, ancestors_of
from coral_hf.generation.target_forward import TargetForward
from coral_hf.utils.compat import cache_kwarg


def tree_of(tokens: list[int], parents: list[int]) -> DraftTree:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    parents = torch.tensor([parents])
    return DraftTree(
        tokens=torch.tensor([tokens]),
        parents=parents,
        depths=torch.tensor([depths]),
        scores=torch.zeros(1, len(tokens)),
        ancestors=ancestors_of(parents, max(depths) + 1),
    )


# root 7 -> a 10, b 11; a -> c 12; b -> d 13; d -> e 14
TREE = tree_of([7, 10, 11, 12, 13, 14], [-1, 0, 0, 1, 2, 4])


def prefilled(target, ids):
    cache = DynamicCache(config=target.config)
    verifier = TargetForward(target, {**cache_kwarg(cache), "attention_mask": None, "use_cache": True})
    verifier.prefill(ids, target.generation_config, lambda states: states[-1])
    return verifier
