"""Recurrent states after a verify forward equal those of single steps along each path, in batches, chains and trees."""

import copy
import pickle
import threading
from inspect import signature

import pytest
import torch
from helpers.parity import CHAIN, TREES, config_of, prompt_of
from helpers.recurrent_targets import HYBRIDS, STATES, make_hybrid
from helpers.tiny_models import make_drafter
from transformers import DynamicCache

from coral_hf.generation.costs.bench import Bench
from coral_hf.generation.draft_tree import DraftTree, ancestors_of
from coral_hf.generation.key_values.recurrent import RecurrentStates
from coral_hf.generation.key_values.recurrent_layers import is_linear, recurrent_modules
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.target_forward import TargetForward
from coral_hf.utils.compat import cache_kwarg


QUICK = ("qwen3_5_text", "jamba", "zamba2", "lfm2")
families = pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STATES]
)
PARENTS = [[-1, 0, 0, 1, 1, 2, 3, 5], [-1, 0, 1, 2, 0, 4, 1, 6]]  # of two rows, deep and wide


def prefilled(target, ids):
    cache = DynamicCache(config=target.config)
    run(target, ids, cache)
    return cache


def run(target, ids, cache, **kwargs):
    start = cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1])[None].expand(len(ids), -1)
    settings = {"position_ids": positions, "use_cache": True, "output_hidden_states": True, **kwargs}
    with torch.no_grad():
        return target(input_ids=ids, **settings, **cache_kwarg(cache))


def states_of(cache):
    layers = [layer for layer in cache.layers if is_linear(layer)]
    found = [
        state for layer in layers for part in (layer.conv_states, layer.recurrent_states) for state in part.values()
    ]
    return [state for state in found if state is not None]


def tree_of(parents, seed=5):
    parents = torch.tensor(parents)
    depths = torch.zeros_like(parents)
    for node in range(1, parents.shape[1]):
        depths[:, node] = depths.gather(1, parents[:, node : node + 1])[:, 0] + 1
    tokens = torch.randint(3, 128, parents.shape, generator=torch.Generator().manual_seed(seed))
    return DraftTree(tokens, parents, depths, depths.float(), ancestors_of(parents, int(depths.max())))


def path_to(parents, node):
    path = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


@families
@pytest.mark.parametrize("parents", [PARENTS[0], list(range(-1, 6))], ids=["tree", "chain"])
def test_each_node_is_a_single_step_after_its_parent(family, parents):
    """Logits of all nodes, and the states after every path, equal those of plain single steps along it."""
    target, ids = make_hybrid(family), prompt_of(9)
    tree = DraftTree.chain(tree_of([parents]).tokens) if parents[-1] == len(parents) - 2 else tree_of([parents])
    for end in range(len(parents)):
        path = path_to(parents, end)
        expected = prefilled(target, ids)
        for node in path:
            logits = run(target, tree.tokens[:, node : node + 1], expected).logits[:, 0]
        verifier = TargetForward(target, cache_kwarg(prefilled(target, ids)))
        verifier.cache.activate_past_recording()
        verifier.mask = None
        with torch.no_grad(), verifier.recording():
            found = verifier.verify(tree).logits[:, end]
            verifier.keep([path], len(parents))
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
        assert verifier.cache.get_seq_length() == expected.get_seq_length()
        for ours, theirs in zip(states_of(verifier.cache), states_of(expected), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@families
def test_rows_accept_paths_of_their_own(family):
    """Two rows with trees of different shapes: each row's states are those of the row alone."""
    target = make_hybrid(family)
    ids, tree = torch.cat([prompt_of(9, 1), prompt_of(9, 2)]), tree_of(PARENTS)
    modules = recurrent_modules(target)
    for paths in ([[0], [0, 1, 2, 3]], [[0, 2, 5, 7], []], [[0, 1], [0, 4]]):
        cache, alone = prefilled(target, ids), [prefilled(target, ids[row : row + 1]) for row in range(2)]
        recurrent = RecurrentStates(target, cache)
        inputs = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad(), recurrent.stepping(tree):
            for index in recurrent.layers:
                modules[index][0](inputs, **{name_of(modules[index][0]): cache})
        recurrent.keep(paths)
        for row, path in enumerate(paths):
            for index in recurrent.layers:
                alone[row].layers[index].record_past = False
                for node in path:
                    with torch.no_grad():
                        module = modules[index][0]
                        module(inputs[row : row + 1, node : node + 1], **{name_of(module): alone[row]})
            for ours, theirs in zip(states_of(cache), states_of(alone[row]), strict=True):
                torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-5, rtol=1e-5)


def name_of(module):
    """The module's name for its cache."""
    parameters = signature(module.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in parameters)


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_convolutions_that_are_cropped_are_those_that_are_stepped(family, kept):
    """Transformers records their inputs until the crop: the states equal those of reading one token at a time."""
    target, ids = make_hybrid(family), prompt_of(9)
    chain = list(range(-1, 5))
    caches = []
    for tree in (DraftTree.chain(tree_of([chain]).tokens), tree_of([chain])):  # only what says it is one is cropped
        verifier = TargetForward(target, cache_kwarg(prefilled(target, ids)))
        verifier.cache.activate_past_recording()
        with torch.no_grad(), verifier.recording():
            logits = verifier.verify(tree).logits
            verifier.keep([list(range(kept))], 6)
        caches.append([logits, *states_of(verifier.cache)])
    for cropped, stepped in zip(*caches, strict=True):
        torch.testing.assert_close(cropped, stepped)


@pytest.mark.parametrize(
    "family", ["qwen3_5_text", *(pytest.param(f, marks=pytest.mark.slow) for f in HYBRIDS if f != "qwen3_5_text")]
)
def test_projections_are_products_over_all_nodes(family):
    """From the second draft on each linear layer that needs no state runs once a forward, as in plain decoding."""
    target, ids = make_hybrid(family), prompt_of(9)
    verifier = TargetForward(target, cache_kwarg(prefilled(target, ids)))
    module = recurrent_modules(target)[next(i for i, layer in enumerate(verifier.cache.layers) if is_linear(layer))][0]
    calls = []
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            child.register_forward_hook(lambda *_, name=name: calls.append(name))
    for _ in range(3):
        calls.clear()
        with torch.no_grad():
            verifier.verify(DraftTree.chain(prompt_of(6, 4)))
        verifier.keep([[0, 1]], 6)
    counts = {name: calls.count(name) for name in calls}
    stateful = {"x_proj"}  # Mamba 1's, which reads what was convolved
    assert {name for name, count in counts.items() if count > 1} <= stateful and {"out_proj", "o_proj"} & counts.keys()


def test_threads_and_copies_know_nothing_of_a_verification():
    """While one thread verifies, the target is unchanged in another thread, and so are its copies and pickles."""
    target, ids = make_hybrid("qwen3_5_text"), prompt_of(9)
    module = target.model.layers[0].linear_attn
    kind, expected = type(module), run(target, ids, DynamicCache(config=target.config)).logits
    verifier = TargetForward(target, cache_kwarg(prefilled(target, ids)))
    recurrent = RecurrentStates(target, verifier.cache)
    found = []

    def read():
        found.append(run(target, ids, DynamicCache(config=target.config)).logits)
        found.append(copy.deepcopy(target))
        found.append(pickle.loads(pickle.dumps(module)))

    with recurrent.stepping(DraftTree.chain(prompt_of(3))):
        assert type(module) is not kind and type(module).__name__ == kind.__name__
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert type(module) is kind
    logits, copied, unpickled = found
    assert torch.equal(logits, expected)
    assert type(copied.model.layers[0].linear_attn) is kind and type(unpickled) is kind
    assert torch.equal(run(copied, ids, DynamicCache(config=target.config)).logits, expected)


def test_a_failed_forward_leaves_the_modules_as_they_were():
    target = make_hybrid("qwen3_5_text")
    module, drafter = target.model.layers[0].linear_attn, make_drafter(target)
    kind = type(module)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no memory")

    handle = target.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        target.generate(prompt_of(9), generation_config=config_of(CHAIN), assistant_model=drafter)
    handle.remove()
    assert type(module) is kind
    plain = target.generate(prompt_of(9), generation_config=config_of({}))
    drafted = target.generate(prompt_of(9), generation_config=config_of(CHAIN), assistant_model=drafter)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("size", [CHAIN, TREES["tree16"]], ids=["chain", "tree16"])
def test_what_costs_are_measured_of_is_as_deep_as_drafts_are(size):
    target = make_hybrid("qwen3_5_text")
    bench = Bench(target, make_drafter(target), DraftSettings(**size), 1, 20, 20, 2)
    nodes = DraftSettings(**size).draft_total_tokens
    assert [bench.star(count).depth for count in (1, 2, nodes)] == [0, 1, size["draft_depth"]]
    assert bench.star(nodes).is_chain == (size is CHAIN)
    before = [state.clone() for state in states_of(bench.verifier.cache)]
    with torch.no_grad():
        for count in (nodes, 1, nodes):
            bench.verify(bench.star(count))
    for ours, theirs in zip(states_of(bench.verifier.cache), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "size", [CHAIN, pytest.param(TREES["tree16"], marks=pytest.mark.slow)], ids=["chain", "tree16"]
)
def test_costs_decide_the_size_of_drafts(size, tmp_path, monkeypatch):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path))
    target, ids = make_hybrid("qwen3_5_text"), prompt_of(12)
    drafter = make_drafter(target)
    plain = target.generate(ids, generation_config=config_of({}))
    config = config_of({**size, "draft_cost_aware": True})
    assert torch.equal(target.generate(ids, generation_config=config, assistant_model=drafter), plain)
