"""A forward of the target keeps only the hidden states that the drafter reads."""

import copy

import pytest
import torch
from helpers.parity import CHAIN, TREES, compare, config_of, prompt_of
from helpers.tiny_models import FAMILIES, make_drafter, make_target

from coral_hf.utils import compat
from coral_hf.utils.compat import hidden_states_to_ask


selects = pytest.mark.skipif(compat._selection is None, reason="this Transformers release keeps all states")
LAYERS = {"last": [-1], "three": [1, 2, 3], "unordered": [-1, 0, 2]}
DRAFTS = {"chain": CHAIN, "tree": TREES["tree16"]}


@pytest.fixture
def record():
    """`record(target)` is a list that grows with the hidden states of every forward."""
    handles = []

    def start(target) -> list[tuple]:
        seen: list[tuple] = []
        handles.append(target.register_forward_hook(lambda *args: seen.append(args[-1].hidden_states)))
        return seen

    yield start
    for handle in handles:
        handle.remove()


@selects
@pytest.mark.parametrize(
    ("family", "layers", "draft"),
    [("llama", "last", "chain"), ("llama", "unordered", "tree"), *((family, "three", "tree") for family in FAMILIES)],
)
def test_states_that_are_kept_are_those_that_are_read(family, layers, draft, record):
    target = make_target(family)
    drafter = make_drafter(target, target_feature_layers=LAYERS[layers])
    prompt = prompt_of(30)
    _, stats = compare(target, drafter, prompt, DRAFTS[draft], max_new_tokens=20)
    assert stats.n_accepted
    seen = record(target)
    target.generate(prompt, generation_config=config_of(DRAFTS[draft], max_new_tokens=20), assistant_model=drafter)
    read = {layer % 5 for layer in LAYERS[layers]}
    assert len(seen) > 2
    for states in seen:
        assert {index for index, state in enumerate(states) if state is not None} == read
    # bytes of a prefill: of as many states as the drafter reads
    size = sum(state.nbytes for state in seen[0] if state is not None)
    assert size == len(read) * prompt.shape[1] * target.config.hidden_size * target.dtype.itemsize


@selects
def test_a_prompt_in_chunks(record):
    target = make_target()
    drafter = make_drafter(target, target_feature_layers=[1, 2])
    seen = record(target)
    config = config_of(TREES["tree8"], prefill_chunk_size=7)
    target.generate(prompt_of(20), generation_config=config, assistant_model=drafter)
    assert all([state is not None for state in states] == [False, True, True, False, False] for states in seen)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_caller_who_asks_for_states_gets_all(draft, record):
    target = make_target()
    drafter, prompt = make_drafter(target, target_feature_layers=[1]), prompt_of(20)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    plain = target.generate(prompt, generation_config=config_of({}, **wanted))
    seen = record(target)
    drafted = target.generate(prompt, generation_config=config_of(DRAFTS[draft], **wanted), assistant_model=drafter)
    assert all(state is not None for states in seen for state in states)
    for ours, theirs in zip(drafted.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_release_that_cannot_select_is_asked_for_all(monkeypatch, record):
    target = make_target()
    drafter = make_drafter(target, target_feature_layers=[1])
    monkeypatch.setattr(compat, "_selection", None)
    assert hidden_states_to_ask(target, [1]) is True
    seen = record(target)
    compare(target, drafter, prompt_of(20), CHAIN)
    drafted = [states for states in seen if states is not None]
    assert drafted and all(state is not None for states in drafted for state in states)


@selects
def test_a_target_whose_states_are_not_one_per_layer_is_asked_for_all():
    target = make_target()
    assert hidden_states_to_ask(target, [-1, 1]) == [1, 4] == hidden_states_to_ask(target.get_decoder(), [1, 4])
    longer = copy.deepcopy(target)
    longer.model.layers.append(copy.deepcopy(longer.model.layers[0]))
    assert hidden_states_to_ask(longer, [-1]) is True
    looping = copy.deepcopy(target)
    looping.model.config.n_recurrent_loops = 2  # Dory's: its layers run twice, and have a state each time
    assert hidden_states_to_ask(looping, [-1]) is True
    other = copy.deepcopy(target)
    other.model._can_record_outputs = {}
    assert hidden_states_to_ask(other, [-1]) is True
