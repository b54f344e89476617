"""The transposed product of a few rows: the same numbers, on the intended layers only, and undone after the call."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target
from torch import nn
from torch.nn import functional as F

from coral_hf import coral_generate
from coral_hf.drafter import few_rows
from coral_hf.drafter.few_rows import few_row_linear, few_row_linears


THREADS = 2


@pytest.fixture(autouse=True)
def fast_cpu(monkeypatch):
    """As on the machines where the transposed product is used."""
    monkeypatch.setattr(few_rows, "_TRANSPOSED_IS_FASTER", True)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_product(rows, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(1, rows, 40), torch.randn(70, 40)
    offset = torch.randn(70) if bias else None
    with torch.no_grad():
        found = few_row_linear(x, weight, offset)
    assert found.shape == (1, rows, 70) and found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, weight, offset))


@pytest.mark.parametrize("rows", [8, 9, 24, 32])
@pytest.mark.parametrize("outputs", [20, 21, 59])
def test_many_outputs_are_computed_in_blocks(rows, outputs, monkeypatch):
    monkeypatch.setattr(few_rows, "_MOST_OUTPUTS", 20)
    x, weight, bias = torch.randn(1, rows, 12), torch.randn(outputs, 12), torch.randn(outputs)
    with torch.no_grad():
        found = few_row_linear(x, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, weight, bias))


def plain_calls(monkeypatch):
    calls, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
    return calls


def test_takes_the_plain_product_elsewhere(monkeypatch):
    calls = plain_calls(monkeypatch)
    x, weight = torch.randn(1, 4, 8), torch.randn(6, 8)
    few_row_linear(x, weight)  # gradients are recorded
    with torch.no_grad():
        few_row_linear(x.double(), weight.double())
        few_row_linear(x.bfloat16(), weight.bfloat16())
        few_row_linear(x[:, :1], weight)
        few_row_linear(x[:, :0], weight)
        few_row_linear(torch.randn(1, 33, 8), weight)
        assert len(calls) == 6
        few_row_linear(x, weight)
        torch.set_num_threads(1)
        few_row_linear(x, weight)
    assert len(calls) == 7


class Wrapped(nn.Linear):
    pass


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Wrapped(8, 8), nn.Linear(8, 5, bias=False))
    return model.requires_grad_(False)


@torch.no_grad()
def test_layers_compute_the_same_and_are_put_back(monkeypatch):
    model, x = make_model(), torch.randn(3, 8)
    expected = model(x)
    calls = plain_calls(monkeypatch)
    with pytest.raises(RuntimeError, match="stop"), few_row_linears(model):
        torch.testing.assert_close(model(x), expected)
        assert len(calls) == 1  # of the subclass, which may do something else
        with few_row_linears(model, model[0]):
            model(x)
        assert len(calls) == 2
        model(x)
        assert len(calls) == 3
        raise RuntimeError("stop")
    assert not any(type(layer) is few_rows._FewRowLinear for layer in model) and not few_rows._users
    assert torch.equal(model(x), expected)


def test_leaves_layers_alone_that_others_have_wrapped():
    model = make_model()
    original = model[0].forward
    model[0].forward = wrapped = lambda x: original(x)
    with few_row_linears(model):
        assert model[0].forward is wrapped and type(model[2]) is few_rows._FewRowLinear
    assert model[0].forward is wrapped and type(model[2]) is nn.Linear


def test_leaves_other_dtypes_and_devices_alone():
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8))
    with few_row_linears(model):
        assert [type(layer) is few_rows._FewRowLinear for layer in model] == [False, False, True]


class Quantised(torch.Tensor):
    """Claims to be float32, like torchao's tensors."""


def test_leaves_weights_alone_that_are_no_plain_tensors():
    model = make_model()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Quantised), requires_grad=False)
    assert model[0].weight.dtype == torch.float32 and type(model[0].weight) is Quantised
    with few_row_linears(model):
        assert [type(layer) is few_rows._FewRowLinear for layer in model] == [False, False, True]


@pytest.mark.parametrize("how", ["torch.compile", "compile", "forward"])
@pytest.mark.parametrize("part", ["model", "inner", "layer"])
def test_leaves_what_is_compiled_alone(how, part):
    """Also below an uncompiled module: a changed layer would be recompiled, or not be noticed at all."""
    inner = make_model()
    model = nn.Sequential(inner, nn.Linear(5, 5))
    found = {"model": model, "inner": inner, "layer": inner[0]}[part]
    if how == "torch.compile":
        compiled = torch.compile(found, backend="eager")
        if part == "model":
            model = compiled
        elif part == "inner":
            model[0] = compiled
        else:
            inner[0] = compiled
    elif how == "compile":
        found.compile(backend="eager")
    else:
        found.forward = torch.compile(found.forward, backend="eager")
    layers = [inner[0]._orig_mod if how == "torch.compile" and part == "layer" else inner[0], inner[2]]
    before = [dict(vars(layer)) for layer in layers]
    with few_row_linears(model):
        assert vars(layers[0]) == before[0]
        assert (type(layers[1]) is nn.Linear) == (part != "layer")


def test_two_threads_share_a_model():
    model, inside, leave = make_model(), threading.Event(), threading.Event()

    def hold():
        with few_row_linears(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with few_row_linears(model):
        pass
    assert type(model[0]) is few_rows._FewRowLinear
    leave.set()
    thread.join()
    assert type(model[0]) is nn.Linear


def test_a_model_can_be_freed():
    model = make_model()
    layer = weakref.ref(model[0])
    with few_row_linears(model):
        pass
    del model
    gc.collect()
    assert layer() is None


def test_generate_uses_it_and_leaves_nothing(prompt, monkeypatch):
    target, seen = make_target(dtype=torch.float32), []
    original = few_rows.few_row_linear
    monkeypatch.setattr(few_rows, "few_row_linear", lambda *args: seen.append(args[0].shape) or original(*args))
    drafter = make_drafter(target)
    for stock in (False, True):
        seen.clear()
        coral_generate(target, drafter, input_ids=prompt, max_new_tokens=6, do_sample=False, draft_stock_loop=stock)
        assert any(1 < shape[-2] <= 32 for shape in seen)
    modules = [*target.modules(), *drafter.modules()]
    assert not any(type(module) is few_rows._FewRowLinear for module in modules)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_a_call_runs_is_plain(copied):
    model = make_model()
    x = torch.randn(4, model[0].in_features)
    with few_row_linears(model):
        other, layer = copied(model), copied(model[0])
    for found in (layer, *(() if other[0] is model[0] else other)):
        assert type(found) is not few_rows._FewRowLinear and "forward" not in vars(found)
    assert torch.equal(layer(x), model[0](x)) and torch.equal(other(x), model(x))
