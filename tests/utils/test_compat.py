"""One name for the KV cache in every supported Transformers, and all deprecations that we cause are noticed."""

import inspect

import pytest
import torch
from helpers.parity import CHAIN, STOCK, config_of, prompt_of
from helpers.tiny_models import make_drafter
from transformers import DynamicCache
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.logging import get_logger, warning_once

from coral_hf.utils.compat import CACHE_NAME, cache_kwarg, cache_of


OTHER_NAME = {"cache": "past_key_values", "past_key_values": "cache"}[CACHE_NAME]


def test_the_name_is_that_of_forwards_outputs_and_inputs(target):
    for method in (target.forward, target.prepare_inputs_for_generation):
        names = inspect.signature(method).parameters
        assert CACHE_NAME in names and OTHER_NAME not in names
    outputs = target(prompt_of(5), use_cache=True, **cache_kwarg(cache := DynamicCache()))
    assert cache_of(outputs) is cache
    assert cache_of(target(prompt_of(5), use_cache=False)) is None


@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_a_prefilled_cache_under_the_old_name(target):
    """`past_key_values` is accepted by every release; the stock loop would read the prompt twice."""
    drafter, ids = make_drafter(target), prompt_of(20)

    def run(draft=None):
        filled = DynamicCache()
        target(ids[:, :12], use_cache=True, **cache_kwarg(filled))
        assistant = {} if draft is None else {"assistant_model": drafter}
        config = config_of(draft or {})
        return target.generate(ids, generation_config=config, past_key_values=filled, **assistant), filled

    (plain, _), (drafted, cache) = run(), run(CHAIN)
    assert torch.equal(plain, drafted)
    assert cache.get_seq_length() == drafted.shape[1] - 1
    with pytest.raises(ValueError, match="prefilled cache"):
        run(STOCK)


class Renamed(torch.nn.Module):
    @deprecate_kwarg("old", "99.0", new_name="new")
    def forward(self, new=None):
        return new


def test_our_deprecations_are_errors(our_deprecations):
    """Deprecations of forwards, of functions and in Transformers' log; those of other libraries are ignored."""
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        Renamed()(old=1)
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        Renamed().forward(old=1)

    def deprecated():
        get_logger("transformers.models").warning_once("This is deprecated.")

    exec(compile("deprecated()", "/site-packages/peft/model.py", "exec"), {"deprecated": deprecated})
    assert not our_deprecations
    warning_once.cache_clear()
    deprecated()
    [message] = our_deprecations
    assert "test_compat.py" in message and "This is deprecated." in message
    our_deprecations.clear()


def test_what_a_helper_of_the_called_function_warns_of_is_ours(target, our_deprecations):
    """`generate` itself does not log it."""
    target.generate(prompt_of(5), generation_config=config_of({}), max_new_tokens=2)
    assert [message for message in our_deprecations if "test_compat.py" in message and "max_new_tokens" in message]
    our_deprecations.clear()
