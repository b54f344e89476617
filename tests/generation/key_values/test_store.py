"""The key-value store against full forwards: ragged rows, trees at each row's end, removed rows, rolling windows."""

import pytest
import torch
from helpers.batches import padded
from helpers.tiny_models import make_target
from helpers.trees import tree_of
from transformers import DynamicCache

from coral_hf.generation.draft_tree import DraftTree
from coral_hf.generation.key_values import store as store_module
from coral_hf.generation.key_values.dynamic import tree_attention_mask
from coral_hf.generation.key_values.store_forward import StoreForward
from coral_hf.utils.compat import cache_kwarg


def stacked(trees: list[DraftTree]) -> DraftTree:
    names = ("tokens", "parents", "depths", "scores", "ancestors")
    return DraftTree(*(torch.cat([getattr(tree, name) for tree in trees]) for name in names))


def random_tree(root: int, nodes: int, generator: torch.Generator) -> DraftTree:
    parents = [-1] + [int(torch.randint(node, (), generator=generator)) for node in range(1, nodes)]
    return tree_of([root] + [3 + node for node in range(1, nodes)], parents)


def filled(target, lengths: list[int]) -> tuple[StoreForward, list[list[int]]]:
    """A store with prompts of these lengths, and their ids; the last of each is the first root."""
    ids, mask = padded([length + 1 for length in lengths])
    cache = DynamicCache(config=target.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    target(
        ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True, **cache_kwarg(cache)
    )
    forward = StoreForward(target, len(lengths))
    padding = [max(lengths) - length for length in lengths]
    forward.store.load(cache, range(len(lengths)), padding, lengths)
    assert all(layer.keys is None for layer in cache.layers)
    return forward, [row[gap:].tolist() for row, gap in zip(ids, padding, strict=True)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("lengths", [[9], [7, 7], [5, 20, 1, 12]], ids=str)
def test_rounds_equal_full_forwards(family, lengths, monkeypatch):
    """Thirty rounds of random trees and paths, blocks of a few places, rows that leave."""
    monkeypatch.setattr(store_module, "BLOCK", 8)
    target, generator = make_target(family), torch.Generator().manual_seed(0)
    with torch.no_grad():
        forward, texts = filled(target, lengths)
        for round_ in range(30):
            tree = stacked([random_tree(text[-1], 6, generator) for text in texts])
            logits = forward.run(tree).logits
            paths = []
            for row, text in enumerate(texts):
                node = int(torch.randint(6, (), generator=generator))
                path = tree.ancestors[row, node].nonzero().flatten().tolist()
                expected = target(torch.tensor([text[:-1] + tree.tokens[row, path].tolist()])).logits[0, -1]
                torch.testing.assert_close(logits[row, node], expected, rtol=1e-8, atol=1e-8)
                text += [*tree.tokens[row, path[1:]].tolist(), 5]
                paths.append(path)
            forward.store.keep(paths)
            if round_ in (9, 19) and len(texts) > 1:
                order = (
                    list(range(1, len(texts))) if len(texts) == 2 else [0, len(texts) - 1, *range(2, len(texts) - 1)]
                )
                forward.store.keep_rows(order)
                texts = [texts[row] for row in order]
    assert forward.store.lengths[: len(texts)] == [len(text) - 1 for text in texts]
    for window, kind in forward.store.kinds.items():
        assert all(buffer.shape[3] % 8 == 0 for buffer in kind.buffers)
        if window is not None:  # what no window reaches is forgotten
            assert kind.base > 0 and kind.buffers[0].shape[3] <= window + max(lengths) + 6 + 3 * 8


def test_one_gather_and_one_scatter_for_all_layers(target, monkeypatch):
    """For any number of layers and rows; none if the accepted nodes are at the front."""
    calls = []
    monkeypatch.setattr(store_module.KeyValueStore, "_move", lambda store, moves: calls.append(moves))
    with torch.no_grad():
        forward, texts = filled(target, [5, 9])
        forward.run(stacked([tree_of([text[-1], 4, 5], [-1, 0, 0]) for text in texts]))
    assert len(forward.store.kinds[None].buffers) == 1 and forward.store.kinds[None].buffers[0].shape[0] == 2 * 4
    forward.store.keep([[0, 1], [0]])
    assert not calls
    forward.store.begin(3)
    forward.store.keep([[0, 2], [0, 2]])
    assert calls == [[(0, 9, 8), (1, 12, 11)]]


def test_mask_of_ragged_rows_by_hand():
    """Prefixes of 1 and 3 tokens, then root a, its children b and c, and d below c."""
    tree = stacked([tree_of([7, 10, 11, 12], [-1, 0, 0, 2])] * 2)
    mask = tree_attention_mask(tree, torch.tensor([1, 3]), 7, 0)
    assert mask[:, 0].int().tolist() == [
        [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1]],
    ]
    windowed = tree_attention_mask(tree, torch.tensor([1, 3]), 7, 0, sliding_window=2)
    assert windowed[1, 0].int().tolist() == [
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    equal = tree_attention_mask(tree, torch.tensor([3, 3]), 7, 0, sliding_window=2)
    assert torch.equal(equal, tree_attention_mask(tree, 3, 7, 0, sliding_window=2))
