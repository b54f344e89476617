"""Tree masks by hand, tree forwards against every path run alone, compaction against recomputation."""

from contextlib import nullcontext

import pytest
import torch
from helpers.parity import TREES, Recorder, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target
from helpers.trees import TREE, prefilled
from transformers import DynamicCache

from coral_hf.generation.key_values.dynamic import check_cache, compact_cache, tree_attention_mask
from coral_hf.utils.compat import cache_kwarg


def test_mask_by_hand():
    mask = tree_attention_mask(TREE, prefix_length=2, key_length=8, key_offset=0)
    assert mask.shape == (1, 1, 6, 8)
    assert mask[0, 0].int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 0, 1, 1],
    ]


def test_mask_with_window_and_padding():
    """Window 3 counts depth in the tree: node e (depth 3, position 5) sees positions 3, 4, 5 only."""
    mask = tree_attention_mask(TREE, prefix_length=2, key_length=8, key_offset=0, sliding_window=3)
    assert mask[0, 0, 5].int().tolist() == [0, 0, 0, 0, 1, 0, 1, 1]
    assert mask[0, 0, 0].int().tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert mask[0, 0, 1].int().tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    padded = tree_attention_mask(TREE, 2, 8, 0, prefix_mask=torch.tensor([[False, True]]))
    assert padded[0, 0, 0].int().tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    # a sliding layer that has dropped the first token: keys start at 1
    assert tree_attention_mask(TREE, 2, 7, 1, sliding_window=3)[0, 0, 0].int().tolist() == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("length", [6, 30])
def test_tree_forward_equals_every_path_alone(family, attention, length):
    target = make_target(family, attention=attention)
    ids = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = prefilled(target, ids).verify(TREE).logits
        for node in range(TREE.num_nodes):
            path = TREE.ancestors[0, node].nonzero().flatten()
            alone = target(torch.cat([ids, TREE.tokens[:, path]], dim=1)).logits[:, -1]
            # eager attention takes its softmax in float32
            tolerance = 1e-9 if attention == "sdpa" else 1e-4
            torch.testing.assert_close(logits[:, node], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_compaction_rounds_equal_recomputation(family):
    """After thirty rounds of accepting random paths, the cache equals that of a new forward over the text."""
    target = make_target(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (1, 5), generator=generator)
    with torch.no_grad():
        verifier = prefilled(target, ids)
        for _ in range(30):
            node = int(torch.randint(TREE.num_nodes, (), generator=generator))
            path = TREE.ancestors[0, node].nonzero().T
            logits = verifier.verify(TREE).logits[:, node]
            compact_cache(verifier.cache, path[0].tolist(), TREE.num_nodes)
            ids = torch.cat([ids, TREE.tokens[:, path[0]]], dim=1)
            assert verifier.cache.get_seq_length() == ids.shape[1]
            torch.testing.assert_close(logits, target(ids).logits[:, -1], rtol=1e-8, atol=1e-8)


class Breaking(Recorder):
    """The user's connection ends with the third token."""

    def put(self, value):
        if len(self.puts) == 3:
            raise BrokenPipeError
        super().put(value)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("fails", [False, True], ids=["whole", "failing"])
def test_sliding_layers_keep_their_window_after_a_call(family, fails):
    """A cache that a call returns or was given stops recording for a crop; also after an error."""
    target = make_target(family)
    drafter, ids, cache = make_drafter(target), prompt_of(30), DynamicCache(config=target.config)
    streamer = Breaking() if fails else None
    with pytest.raises(BrokenPipeError) if fails else nullcontext():
        config = config_of(TREES["tree16"], max_new_tokens=6)
        target.generate(
            ids, generation_config=config, assistant_model=drafter, streamer=streamer, **cache_kwarg(cache)
        )
    assert any(layer.is_sliding for layer in cache.layers)
    longer = torch.cat([ids, prompt_of(12, seed=8)], dim=1)
    if not fails:  # else what was accepted is not known
        longer = torch.cat([target.generate(ids, max_new_tokens=6, do_sample=False), longer[:, 30:]], dim=1)
        plain = target.generate(longer, max_new_tokens=40, do_sample=False)
        cached = target.generate(longer, max_new_tokens=40, do_sample=False, **cache_kwarg(cache))
        assert torch.equal(plain, cached)
    else:
        target(longer[:, 30:], use_cache=True, **cache_kwarg(cache))
    for layer in cache.layers:
        assert not layer.is_sliding or (not layer.record_past and layer.keys.shape[2] == 15)


def test_a_layer_without_keys_of_its_own_is_left_alone():
    """Layers that use another layer's keys store none."""
    cache, generator = DynamicCache(), torch.Generator().manual_seed(0)
    rows = torch.randn(2, 1, 2, 8, 4, generator=generator)  # two of the prompt, six of the tree
    for layer in (0, 2):
        cache.update(*rows[:, :, :, :2].clone(), layer)
    cache.activate_past_recording()
    for layer in (0, 2):
        cache.update(*rows[:, :, :, 2:].clone(), layer)
    compact_cache(cache, [0, 2, 4], num_nodes=6)
    assert not cache.layers[1].is_initialized
    assert torch.equal(cache.layers[2].keys, rows[0][:, :, [0, 1, 2, 4, 6]])


def test_recurrent_layers_of_an_old_transformers_are_refused():
    class LinearAttentionLayer:
        pass

    class Fake:
        layers = (LinearAttentionLayer(),)

    for branches in (False, True):  # trees are not sent to chains that are refused as well
        with pytest.raises(ValueError, match="newer Transformers"):
            check_cache(Fake, branches)
    LinearAttentionLayer.activate_past_recording = lambda self: None
    for branches in (False, True):
        check_cache(Fake, branches)
