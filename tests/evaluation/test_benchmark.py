"""`benchmark`: the record, what an interrupted run leaves, and the refusals before anything is written."""

import json
from functools import partial

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from torch._dynamo.utils import counters
from transformers import CompileConfig

from coral_hf.cli import main
from coral_hf.data.prompts import Prompt
from coral_hf.evaluation import benchmark, compiling
from coral_hf.evaluation.benchmark import differences, paired_speedup, print_table, result_row, run_benchmark
from coral_hf.evaluation.methods import PRESETS, Measurement, Method, measure, parse_methods
from coral_hf.evaluation.plots import _acceptance, _speedup, plot_benchmark
from coral_hf.generation.compiled import plan


PROMPTS = [Prompt(f"p{i}", "abc" if i < 2 else "xyz", (f"w{i} w{i + 1}", "more")[: i % 2 + 1]) for i in range(3)]


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_tokenizer(), make_drafter(target, draft_depth=3, draft_top_k=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two drafters, an assistant and prompts in the folder of a tiny target, which is the working directory."""
    target = make_target(dtype=torch.float32)
    for name in ("target", "assistant"):
        target.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for seed, name in enumerate(("eagle", "hass")):
        make_drafter(target, seed=seed).save_pretrained(tmp_path / "drafters" / name)
    rows = "".join(json.dumps({"id": prompt.id, "turns": prompt.turns}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_temperatures(pair, tmp_path):
    target, tokenizer, drafter = pair
    methods = [
        Method("coral", drafter),
        Method("stock", drafter, {"draft_top_k": 1, "draft_stock_loop": True}),
        Method("prompt_lookup", None, {"prompt_lookup_num_tokens": 3}),
    ]
    record = run_benchmark(target, tokenizer, methods, PROMPTS, tmp_path, 8, temperatures=[0, 1])
    assert record == json.loads((tmp_path / "benchmark.json").read_text())
    assert not record["partial"] and record["temperatures"] == [0.0, 1.0] and record["seed"] == 0
    rows = {(row["method"], row["benchmark"], row["temperature"]): row for row in record["runs"]}
    assert len(rows) == len(record["runs"]) == 4 * 3 * 2
    for method in ("plain", "coral", "stock", "prompt_lookup"):
        greedy, sampled = rows[method, "all", 0.0], rows[method, "all", 1.0]
        # three prompts, one of them of two turns
        assert (
            greedy["identical"] == greedy["n_turns"] == 4
            and greedy["n_prompts"] == 3
            and greedy["first_divergences"] == []
        )
        # other loops draw for all candidates at once: their samples are others by design
        assert sampled["identical"] == (4 if method in ("plain", "coral") else None)
        assert sampled["new_tokens"] > 0
    counts = {
        name: (rows["coral", name, 0.0]["n_prompts"], rows["coral", name, 0.0]["n_turns"]) for name in ("abc", "xyz")
    }
    assert counts == {"abc": (2, 3), "xyz": (1, 1)}
    ids = {name: [prompt.id for prompt in PROMPTS if prompt.benchmark == name] for name in ("abc", "xyz")}
    assert record["prompts"] == ids


@pytest.mark.slow
def test_methods_that_compile(pair, tmp_path, monkeypatch, capsys):
    """Their times exclude compilation. One store is used for all lengths, so that nothing is compiled twice."""
    target, tokenizer, drafter = pair
    monkeypatch.setattr(compiling, "CompileConfig", partial(CompileConfig, backend="eager"))
    monkeypatch.setattr(plan, "_check_backend", lambda *_: None)
    options = plan._options
    monkeypatch.setattr(plan, "_options", lambda *args: {**options(*args), "backend": "eager"})
    methods = parse_methods(["plain_compiled", "coral:draft_top_k=1,draft_depth=2,draft_compile=true"], {"d": drafter})
    assert [method.drafter for method in methods] == [None, drafter]
    counters.clear()
    record = run_benchmark(target, tokenizer, methods, PROMPTS[:2], tmp_path, 8)
    assert counters["stats"]["unique_graphs"] == 3
    assert record["methods"]["plain_compiled"] == {"cache_implementation": "static"}
    assert record["compile_seconds"].keys() == {"plain_compiled", "coral"}
    rows = {row["method"]: row for row in record["runs"] if row["benchmark"] == "all"}
    assert all(row["identical"] == row["n_turns"] for row in rows.values())
    for name, seconds in record["compile_seconds"].items():
        assert seconds > 0.2 and rows[name]["new_tokens"] / rows[name]["tokens_per_second"] < seconds
    assert rows["plain_compiled"]["acceptance_length"] == 1.0
    print_table(record)
    assert "s of compiling, not included in its times" in capsys.readouterr().out


def test_divergences_are_counted_where_they_begin():
    plain = [Measurement([1, 2, 3, 4], 1.0), Measurement([1, 2], 1.0), Measurement([7], 1.0)]
    other = [Measurement([1, 2, 9, 4], 0.5), Measurement([5, 2], 0.5), Measurement([7], 0.5)]
    row = result_row(Method("coral"), "abc", 0.0, plain, other)
    assert row["identical"] == 1 and row["first_divergences"] == [0, 2] and row["speedup"] == 2.0


def test_a_greedy_difference_is_said_where_there_must_be_none():
    row = {"benchmark": "all", "temperature": 0.0, "n_turns": 8, "method": "coral", "identical": 7}
    rows = [row, row | {"method": "lookup", "identical": 8}, row | {"temperature": 1.0}, row | {"benchmark": "abc"}]
    (line,) = differences({"environment": {"dtype": "float32"}, "runs": rows})
    assert line.startswith("warning: 1 of 8 greedy answers of coral differ from plain generate's in float32")
    assert differences({"environment": {"dtype": "bfloat16"}, "runs": rows}) == []


def test_paired_speedup():
    assert paired_speedup([1.0], [3.0]) == {"speedup": 3.0, "speedup_quartiles": [3.0, 3.0]}
    assert paired_speedup([1.0, 2.0, 4.0], [2.0, 2.0, 16.0])["speedup"] == 2.0
    # never outside of what was measured
    assert paired_speedup([1.0, 1.0], [1.0, 2.0]) == {"speedup": 1.5, "speedup_quartiles": [1.25, 1.75]}


def test_the_fastest_of_several_repeats_counts(pair, tmp_path, monkeypatch):
    target, tokenizer, drafter = pair
    seconds = iter([9.0, 9.0, 4.0, 2.0, 5.0, 1.0, 3.0, 3.0])  # two to warm up, then three rounds of both in turn
    calls = []

    def timed(target, ids, tokens, drafter=None, **settings):
        calls.append(drafter is None)
        return Measurement([5, 6], next(seconds))

    monkeypatch.setattr(benchmark, "measure", timed)
    prompts = [Prompt("a", "abc", ("w1",))]
    record = run_benchmark(target, tokenizer, [Method("coral", drafter)], prompts, tmp_path, 2, repeats=3)
    assert calls == [True, False] * 4 and record["repeats"] == 3
    row = next(row for row in record["runs"] if row["method"] == "coral")
    assert row["speedup"] == 3.0 and row["tokens_per_second"] == 2.0
    with pytest.raises(ValueError, match="repeats=0"):
        run_benchmark(target, tokenizer, [], prompts, tmp_path, repeats=0)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_a_valid_partial_record(pair, tmp_path, monkeypatch, failure):
    """Interrupted during the third prompt: the record has the two before it, and nothing of the third."""
    target, tokenizer, drafter = pair
    place = {"calls": 0}

    def counted(*args, **kwargs):
        place["calls"] += 1
        if place["calls"] > 2 + 2 + 4 + 1:  # warm-up, a prompt of one turn, one of two, plain of the third
            raise failure
        return measure(*args, **kwargs)

    monkeypatch.setattr(benchmark, "measure", counted)
    with pytest.raises(failure):
        run_benchmark(target, tokenizer, [Method("coral", drafter)], PROMPTS, tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["partial"] is True
    assert {row["benchmark"] for row in record["runs"]} == {"abc", "all"}
    assert all((row["n_prompts"], row["n_turns"]) == (2, 3) and row["speedup"] > 0 for row in record["runs"])


def test_refusals_write_nothing(pair, tmp_path):
    target, tokenizer, drafter = pair
    small = make_target(dtype=torch.float64)
    small.resize_token_embeddings(64)
    coral = Method("coral", drafter)
    cases = [
        ([coral, coral], PROMPTS, [0.0], "a name of its own"),
        ([coral], [], [0.0], "no prompts"),
        ([coral], PROMPTS, [], "temperatures"),
        ([coral], PROMPTS, [0.0, -1.0], "at least 0"),
        ([coral], PROMPTS, [float("inf")], "temperature=inf must be a finite"),
        ([Method("router", drafter, {"draft_head": "router"})], PROMPTS, [0.0], "no router"),
        ([Method("coral", make_drafter(make_target("qwen2")))], PROMPTS, [0.0], "trained for this target"),
        ([Method("assistant", small)], PROMPTS, [0.0], "the target's family"),
        (
            [Method("mtp", None, PRESETS["mtp"])],
            PROMPTS,
            [0.0],
            "LlamaForCausalLM has no layers for multi-token prediction",
        ),
        ([Method("dflash", small, PRESETS["dflash"])], PROMPTS, [0.0], "a LlamaForCausalLM, not a DFlash drafter"),
    ]
    for methods, prompts, temperatures, message in cases:
        with pytest.raises(ValueError, match=message):
            run_benchmark(target, tokenizer, methods, prompts, tmp_path / "out", 4, temperatures)
    assert not (tmp_path / "out").exists()


def test_command_with_everything(folder, capsys):
    arguments = [
        "benchmark",
        "--target",
        "target",
        "--drafter",
        "drafters/eagle",
        "drafters/hass",
        "--dtype",
        "float32",
    ]
    arguments += ["--data", "prompts.jsonl", "--quick", "--max-new-tokens", "6", "--temperature", "0", "1"]
    arguments += ["--assistant", "assistant", "--method", "coral", "prompt_lookup", "--profile", "--output", "out"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    record = json.loads((folder / "out" / "benchmark.json").read_text())
    names = ["plain", "eagle/coral", "prompt_lookup", "assistant", "hass/coral"]
    assert sorted({row["method"] for row in record["runs"]}) == sorted(names)
    greedy = {row["method"]: row for row in record["runs"] if row["benchmark"] == "all" and not row["temperature"]}
    for name in names:
        assert greedy[name]["identical"] == greedy[name]["n_turns"] == 3  # --quick: two prompts, three turns
    # one drafter's card must not show another's figures
    assert record["drafter"] is None and record["drafter_sha256"] is None
    assert record["drafters"]["eagle/coral"]["drafter"] == "eagle"
    assert len({row["drafter_sha256"] for row in record["drafters"].values()}) == 2
    assert record["methods"]["assistant"] == {"assistant": "assistant"}
    for name in ("speedup.png", "acceptance_per_depth.png", "step_time.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG") and name in output


def test_command_without_data_answers_the_demos_prompts(folder):
    arguments = ["benchmark", "--target", "target", "--drafter", "drafters/eagle", "--dtype", "float32"]
    assert main([*arguments, "--quick", "--max-new-tokens", "4", "--output", "out"]) == 0
    record = json.loads((folder / "out" / "benchmark.json").read_text())
    assert record["drafter"] == "eagle" and len(record["drafter_sha256"]) == 64
    assert {(row["benchmark"], row["n_prompts"]) for row in record["runs"]} == {("demo", 2), ("all", 2)}


def test_interrupted_command(folder, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupt)
    arguments = ["benchmark", "--target", "target", "--drafter", "drafters/eagle", "--dtype", "float32"]
    assert main([*arguments, "--data", "prompts.jsonl", "--output", "out"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bad_input_of_the_command(folder, capsys):
    other = make_target("qwen2", dtype=torch.float32)
    make_drafter(other).save_pretrained(folder / "drafters" / "other")
    (folder / "empty.jsonl").write_text("")
    arguments = ["benchmark", "--target", "target", "--output", "out", "--dtype", "float32"]
    for extra, message in (
        (["--drafter", "drafters/other", "--data", "prompts.jsonl"], "Load a drafter trained for this target"),
        (["--drafter", "drafters/eagle", "--data", "empty.jsonl"], "contains no prompts: give a file"),
    ):
        assert main([*arguments, *extra]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
    assert not (folder / "out").exists()


def test_plots_leave_out_what_there_is_nothing_of(tmp_path):
    row = {"benchmark": "all", "temperature": 0.0, "n_turns": 2, "speedup": 1.0, "speedup_quartiles": [1.0, 1.0]}
    plain, lookup = ({**row, "method": name, "acceptance_length": None} for name in ("plain", "lookup"))
    assert plot_benchmark({"runs": [plain]}, tmp_path) == []
    paths = plot_benchmark({"runs": [plain, lookup]}, tmp_path, {"methods": {}})
    assert [path.name for path in paths] == ["speedup.png"]
    first = paths[0].read_bytes()
    assert plot_benchmark({"runs": [plain, lookup]}, tmp_path)[0].read_bytes() == first


def test_an_assistants_settings_are_its_own_again():
    """Two methods share one assistant: the settings of one must not affect the other."""
    target, assistant = make_target(), make_target(seed=1)
    before = assistant.generation_config
    seen = []
    forward = assistant.forward

    def watch(*args, **kwargs):
        seen.append(assistant.generation_config.num_assistant_tokens)
        return forward(*args, **kwargs)

    assistant.forward = watch
    measure(target, torch.tensor([[5, 9, 3]]), 6, assistant, num_assistant_tokens=3)
    assert set(seen) == {3}
    assert assistant.generation_config is before and before.num_assistant_tokens != 3


def test_plots_say_what_was_measured_and_hide_no_counts():
    """The title names target and machine, a single benchmark has no "all", and few steps are drawn hollow."""
    from matplotlib.figure import Figure

    row = {"method": "coral", "temperature": 0.0, "n_turns": 2, "speedup": 1.5, "speedup_quartiles": [1.4, 1.6]}
    row |= {"steps": 90, "acceptance_per_depth": [0.5, 1.0], "reached_per_depth": [90, 3]}
    record = {"target": "org/model", "environment": {"device": "CPU", "dtype": "float32", "threads": 2}}
    record["runs"] = [{**row, "benchmark": name} for name in ("gsm8k", "all")]
    figure = _speedup(record, Figure)
    assert figure.get_suptitle() == "model\nCPU, float32, 2 threads"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["gsm8k\n(2 answers)"]
    axes = _acceptance(record, Figure).axes[0]
    assert axes.lines[1].get_xdata().tolist() == [2] and "fewer than 30 steps" in axes.get_xlabel()
    assert "(90 steps)" in axes.get_legend().get_texts()[0].get_text()
