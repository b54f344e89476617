"""What a call compiles, by `draft_compile` or as plain `generate` would, and the refusals before any forward."""

import pytest
import torch
from helpers.graphs import graphed
from helpers.parity import STOCK, TREES, assert_refused, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target
from helpers.unusual_targets import CHAINS_ONLY, build
from transformers import CompileConfig, StaticCache

import coral_hf
from coral_hf.generation.compiled import plan
from coral_hf.generation.compiled.plan import length_of, padded_count
from coral_hf.utils.compat import cache_kwarg


TREE = TREES["tree16"]
COMPILE = {**TREE, "draft_compile": True}


def test_sizes():
    assert [padded_count(nodes) for nodes in (1, 2, 8, 9, 60, 65)] == [1, 8, 8, 16, 64, 128]
    assert [length_of(tokens) for tokens in (1, 256, 257, 4096, 4097, 9000)] == [256, 256, 512, 4096, 8192, 12288]


REFUSALS = {
    "chunked attention": (
        {},
        {"target": ("llama4_text", CHAINS_ONLY["llama4_text"])},
        "layers of type.*draft_compile=False",
    ),
    "a number": ({"draft_compile": 1}, {}, "draft_compile=1 must be True or False"),
    "stock loop": ({**STOCK, "draft_total_tokens": 6}, {}, "draft_stock_loop=True runs Transformers'"),
    "dynamic shapes": ({}, {"compile_config": CompileConfig(dynamic=True)}, "dynamic=True asks for dynamic shapes"),
    "CUDA graphs": (
        {},
        {"compile_config": CompileConfig()},
        "'reduce-overhead' records CUDA graphs, but the target is on 'cpu'",
    ),
    "no such backend": (
        {},
        {"compile_config": CompileConfig(backend="inductr")},
        "backend='inductr' is not a backend",
    ),
    "both": ({}, {"disable_compile": True, "compile_config": None}, "disable_compile=True"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals_come_first_and_leave_no_trace(case):
    size, settings, message = REFUSALS[case]
    family = settings.get("target")
    target = make_target() if family is None else build(*family)
    settings = {name: value for name, value in settings.items() if name != "target"}
    assert_refused(target, make_drafter(target), {**COMPILE, **size}, message, **settings)


def test_a_cache_of_the_caller_is_refused(target):
    filled = target(prompt_of(5), use_cache=True)["cache" if "cache" in cache_kwarg(0) else "past_key_values"]
    assert_refused(target, make_drafter(target), COMPILE, "the call passes its own KV cache", cache=filled)
    static = StaticCache(config=target.config, max_cache_len=64)
    assert_refused(target, make_drafter(target), TREE, "not in StaticLayer", cache=static)


def test_without_a_compiler_inductor_is_refused(target, monkeypatch):
    def none():
        raise RuntimeError("no g++")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    assert_refused(target, make_drafter(target), COMPILE, r"needs a C\+\+ compiler")


@pytest.mark.slow
def test_a_target_that_is_no_one_graph_is_refused_or_compiled_in_parts(target, monkeypatch):
    drafter, ids, forward = make_drafter(target), prompt_of(9), type(target.lm_head).forward
    plain = target.generate(ids, generation_config=config_of({}, max_new_tokens=6))

    def broken(self, hidden):
        if self is target.lm_head and hidden.shape[1] == 8:  # of a tree, not of a level
            torch._dynamo.graph_break()
        return forward(self, hidden)

    monkeypatch.setattr(type(target.lm_head), "forward", broken)
    sizes = {"draft_depth": 2, "draft_top_k": 1, "draft_total_tokens": 3}
    with pytest.raises(ValueError, match=r"cannot compile the models' forward.*fullgraph=False"):
        target.generate(ids, generation_config=graphed(sizes, max_new_tokens=6), assistant_model=drafter)
    parts = graphed(sizes, max_new_tokens=6, compile_config=CompileConfig(backend="eager"))
    assert torch.equal(target.generate(ids, generation_config=parts, assistant_model=drafter), plain)


@pytest.fixture
def options(monkeypatch, untraced):
    """The options of every plan that is made."""
    seen, original = [], plan._options
    monkeypatch.setattr(plan, "_options", lambda *args: seen.append(original(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize(
    "asked", [{}, {"compile_config": CompileConfig(backend="eager")}, {"disable_compile": True}], ids=str
)
def test_a_static_cache_on_a_cpu_is_not_compiled(target, asked, options, transformers_log):
    """Like plain `generate`, which logs once that it does not compile as requested."""
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}))
    for _ in range(2):
        config = config_of(TREE, cache_implementation="static", **asked)
        assert torch.equal(target.generate(ids, generation_config=config, assistant_model=drafter), plain)
    said = [message for message in transformers_log if "Compilation will be skipped" in message]
    assert not options and len(said) == ("compile_config" in asked) and drafter.last_stats.steps


def test_a_static_cache_is_compiled_where_generate_compiles(target, options):
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}))
    asked = CompileConfig(backend="eager", fullgraph=True)
    asked._compile_all_devices = True
    config = config_of(TREE, cache_implementation="static", compile_config=asked)
    assert torch.equal(target.generate(ids, generation_config=config, assistant_model=drafter), plain)
    assert options == [{"fullgraph": True, "dynamic": False, "backend": "eager"}]


def test_of_an_attached_drafter(target, untraced):
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}))
    with coral_hf.attach(target, drafter, **TREE):
        found = target.generate(ids, generation_config=config_of({}, cache_implementation="static"))
        assert torch.equal(found, plain) and drafter.last_stats.steps
    with coral_hf.attach(target, drafter, **COMPILE):
        drafter.last_stats = None
        found = target.generate(ids, generation_config=config_of({}))
        assert torch.equal(found, plain) and drafter.last_stats.steps


def test_defaults(target, options):
    coral_hf.coral_generate(target, make_drafter(target), input_ids=prompt_of(9), max_new_tokens=4, draft_compile=True)
    assert options == [{"fullgraph": True, "dynamic": False, "backend": "inductor"}]


def test_a_drafter_cannot_ask_for_it(target):
    """It depends on the machine, not on the drafter."""
    drafter = make_drafter(target)
    drafter.config.draft_compile = True
    assert not coral_hf.generation.settings.DraftSettings.resolve(drafter.config).draft_compile
