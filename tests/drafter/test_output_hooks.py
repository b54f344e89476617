"""After drafting a target is copied, pickled and sent to a spawned process as before."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from helpers.drafted_calls import both
from helpers.parity import prompt_of
from helpers.tiny_models import make_drafter, make_target

from coral_hf import CoralDraftModel, TargetAdapter


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved, "deepcopy": copy.deepcopy}


def uses():
    """Uses of a target, each of which requests hidden states."""
    ids = prompt_of(9)
    return {
        "from_target": lambda target: CoralDraftModel.from_target(target),
        "features": lambda target: TargetAdapter(target, [1, -1]).compute_features(ids),
        "tree": lambda target: both(target, make_drafter(target), "tree", ids),
        "chain": lambda target: both(target, make_drafter(target, target_feature_layers=[1, 2, 3]), "chain", ids),
    }


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use", list(uses()))
def test_a_used_target_can_be_copied(use, family):
    target, ids = make_target(family), prompt_of(9)
    uses()[use](target)
    expected = target(ids, output_hidden_states=True)
    for name, make in COPIES.items():
        other = make(target)
        assert not any(module._forward_hooks for module in other.modules()), name
        found = other(ids, output_hidden_states=True)
        assert torch.equal(found.logits, expected.logits)
        assert len(found.hidden_states) == len(expected.hidden_states)
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        both(other, make_drafter(other), "tree", ids)
        pickle.dumps(other)
    both(target, make_drafter(target), "tree", ids)


def test_hooks_of_a_user_stay_and_can_be_removed():
    target, ids, seen = make_target(), prompt_of(9), []
    before = target.model.layers[0].register_forward_hook(lambda *_: seen.append("before"))
    CoralDraftModel.from_target(target)
    after = target.model.layers[1].register_forward_hook(lambda *_: seen.append("after"))
    target(ids)
    assert seen[-2:] == ["before", "after"]
    before.remove()
    after.remove()
    seen.clear()
    target(ids)
    assert not seen and len(target(ids, output_hidden_states=True).hidden_states) == 5


def generate(target, queue):
    torch.set_num_threads(1)
    queue.put(target.generate(prompt_of(9), max_new_tokens=4).tolist())


@pytest.mark.slow
def test_a_used_target_reaches_a_spawned_process():
    target, context = make_target(), multiprocessing.get_context("spawn")
    both(target, make_drafter(target), "tree", prompt_of(9))
    queue = context.Queue()
    process = context.Process(target=generate, args=(target, queue))
    process.start()
    assert queue.get(timeout=120) == target.generate(prompt_of(9), max_new_tokens=4).tolist()
    process.join()
