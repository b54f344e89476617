"""`coral-hf make` end to end on a tiny target: its stages, its output, and that a second call repeats nothing."""

import json
import os
import re
import signal
import time

import pytest
import torch
from helpers.parity import TREES, config_of, prompt_of
from helpers.recurrent_targets import make_hybrid
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from transformers import AutoModel

from coral_hf.cli import main
from coral_hf.commands.making import display, measuring, plan, stages
from coral_hf.commands.making.plan import Plan, confirmed, prompts_to_fill, prompts_within
from coral_hf.commands.making.state import MakeState
from coral_hf.generation.statistics import DraftStats


STAGES = ["prompts", "plan", "answers", "training_plan", "training", "tuning", "verification", "benchmark", "card"]
KILLED_STEP = 5


@pytest.fixture
def make(folder, monkeypatch):
    """A command line for 24 short prompts and short answers."""
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(24)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(stages, "LONGEST_ANSWER", 12)
    monkeypatch.setattr(measuring, "MEASURED_TOKENS", 8)
    monkeypatch.setattr(measuring, "CHECKED_TOKENS", 8)
    monkeypatch.setattr(plan, "MOST_PROMPTS", 2)
    return ["make", "--target", "target", "--dtype", "float32", "--data", "many.jsonl", "--output", "made"]


def stages_of(folder) -> dict:
    return json.loads((folder / "made" / "make.json").read_text())["stages"]


def test_from_prompts_to_a_card(make, folder, capsys, monkeypatch):
    assert main([*make, "--tokens", "150", "--yes"]) == 0
    told = capsys.readouterr().out.strip().splitlines()
    assert told[0].startswith("Read 24 rows") and told[1].startswith("Plan: answers 0:")
    assert [line.partition(":")[0] for line in told[-5:]] == [
        "Drafter",
        "On this machine",
        "Verified",
        "Use",
        "Publish",
    ]
    assert "all equal to plain generate" in told[-3] and "coral-hf push made/drafter org/name" in told[-1]
    found = stages_of(folder)
    assert list(found) == STAGES and found["verification"]["answers"] > 0 and found["training"]["steps"] > 0
    drafter = folder / "made" / "drafter"
    saved = json.loads((drafter / "config.json").read_text())
    assert saved["shape"] == "eagle3" and saved["draft_calibration"] is not None and saved["auto_map"]
    assert not list(drafter.glob("checkpoint-*"))
    for name in ("training.json", "tune.json", "check_coral.json", "benchmark.json"):
        assert (drafter / "training" / name).exists(), name
    assert "| " in (drafter / "README.md").read_text()
    train, held_out = (
        {json.loads(line)["id"] for line in (folder / "made" / "prompts" / name).read_text().splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    )
    answered = {
        json.loads(line)["id"] for line in (folder / "made" / "answers" / "responses.jsonl").read_text().splitlines()
    }
    assert answered <= train and not train & held_out and len(train | held_out) == 24
    before = {path: path.stat().st_mtime_ns for path in (folder / "made").rglob("*")}
    monkeypatch.setattr(stages, "regenerate", None)
    assert main([*make, "--tokens", "150", "--yes"]) == 0  # nothing is done twice
    assert capsys.readouterr().out.strip().splitlines() == told[-5:]
    assert {path: path.stat().st_mtime_ns for path in (folder / "made").rglob("*")} == before


@pytest.mark.slow
def test_a_budget_is_spent_and_kept(make, folder, monkeypatch):
    """In half a minute, all time that answers and measuring do not need is spent on training."""
    started = time.monotonic()
    assert main([*make, "--hours", f"{30 / 3600}", "--yes"]) == 0
    found = stages_of(folder)
    assert 15 < time.monotonic() - started < 60 and found["training"]["steps"] > 1


@pytest.mark.slow
def test_without_data_the_target_writes_its_prompts(make, folder, capsys, monkeypatch):
    """As many as its answers need, the first held out; a function replaces the random target's text here."""

    def write(target, tokenizer, count, output, **kwargs):
        rows = [{"id": f"self-{number}", "turns": [f"w{number} w{number + 1}"]} for number in range(count)]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    monkeypatch.setattr(stages, "write_self_prompts", write)
    monkeypatch.setattr(stages, "HELD_OUT_PROMPTS", 4)
    command = [word for word in make if word not in ("--data", "many.jsonl")]
    assert main(command) == 2
    assert "Set their amount with --hours or --tokens" in capsys.readouterr().err
    assert main([*command, "--tokens", "300", "--yes"]) == 0
    answers = (folder / "made" / "answers" / "responses.jsonl").read_text().splitlines()
    held_out = (folder / "made" / "prompts" / "held_out.jsonl").read_text()
    assert 300 <= stages_of(folder)["answers"]["response_tokens"] < 300 + 12 * 64
    assert not {json.loads(line)["id"] for line in answers} & {
        json.loads(line)["id"] for line in held_out.splitlines()
    }


def test_ctrl_c_says_how_to_resume(make, folder, capsys, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.Making, "train", stop)
    assert main([*make, "--tokens", "150", "--yes"]) == 130
    assert "finished stages are kept in made, and the same command resumes" in capsys.readouterr().err


def in_a_killed_process(run) -> None:
    """Runs it in a copy of this process, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)  # it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die(*_args, **_kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(stage: str, monkeypatch) -> None:
    """Kills this process in the middle of a stage; in short stages, when all is done but not yet recorded."""
    if stage == "plan":
        monkeypatch.setattr(stages, "measure_training", die)
    elif stage == "answers":
        answer, calls = stages.regenerate, []

        def regenerate(*args, **kwargs):
            calls.append(args)
            return die() if len(calls) == 3 else answer(*args, **kwargs)

        monkeypatch.setattr(stages, "MORE_ANSWERS", 2)
        monkeypatch.setattr(stages, "FIRST_ANSWERS", 2)
        monkeypatch.setattr(stages, "regenerate", regenerate)
    elif stage == "training":
        step_end = stages.ShowTraining.on_step_end

        def stop(self, args, state, control, **kwargs):
            step_end(self, args, state, control, **kwargs)
            if state.global_step == KILLED_STEP:
                die()

        monkeypatch.setattr(stages.ShowTraining, "on_step_end", stop)
    else:
        finish = MakeState.finish
        monkeypatch.setattr(
            MakeState,
            "finish",
            lambda self, name, **found: die() if name == stage else finish(self, name, **found),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        stage if stage in ("answers", "training", "benchmark") else pytest.param(stage, marks=pytest.mark.exhaustive)
        for stage in STAGES
    ],
)
def test_a_killed_make_resumes(stage, make, folder, monkeypatch):
    """Finished stages are kept unchanged; the killed stage's files are used, and no answer is repeated."""
    command = [*make, "--tokens", "150", "--yes"]
    with monkeypatch.context() as patch:
        kill_in(stage, patch)
        in_a_killed_process(lambda: main(command))
    made = folder / "made"
    kept = stages_of(folder)
    assert list(kept) == STAGES[: STAGES.index(stage)]
    answers = made / "answers" / "responses.jsonl"
    before = answers.read_text() if answers.exists() else ""
    steps, step_end = [], stages.ShowTraining.on_step_end

    def count_step(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(stages.ShowTraining, "on_step_end", count_step)
    assert main(command) == 0
    found = stages_of(folder)
    assert sorted(found) == sorted(STAGES)
    # Until training ends, every start plans the remaining work again.
    assert all(found[name] == value for name, value in kept.items() if name != "plan")
    ids = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert answers.read_text().startswith(before) and len(ids) == len(set(ids))
    last = found["training"]["steps"]
    if STAGES.index(stage) > STAGES.index("training"):
        assert not steps
    else:
        assert steps == list(range(steps[0], last + 1)) and last > KILLED_STEP
        assert 1 < steps[0] <= KILLED_STEP if stage == "training" else steps[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hours", "0"], "--hours 0.0 must be above 0"),
        (["--tokens", "-3"], "--tokens -3 must be above 0"),
        (["--data", "prompts.jsonl", "missing.jsonl"], "missing.jsonl"),
        (["--output", "."], "does not contain a make"),
    ],
)
def test_refusals_are_one_line(words, message, make, capsys):
    assert main([*make, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("coral-hf make: ") and message in error


def test_the_display_names_each_stage_in_a_log_and_moves_by_itself(capsys, monkeypatch):
    monkeypatch.setattr(display, "SECONDS", 0.01)
    shown = display.Display(60.0)
    try:
        shown.show("answers, 10 tokens")
        shown.show("answers, 20 tokens", **{"tokens/s": "5"})
        monkeypatch.setattr(display.time, "monotonic", lambda: shown.started + 30)
        time.sleep(0.1)
    finally:
        shown.close()
    log = capsys.readouterr().err
    assert log.count("make: answers\n") == 1
    assert re.search(r"make: answers, 20 tokens +50%.*0:30 min left, 5 tokens/s", log)


def test_a_small_budget_cuts_answers_sooner():
    found = [stages.longest_answer(hours if hours is None else 3600 * hours) for hours in (0.1, 0.5, 1, 5, None)]
    assert found == [128, 257, 512, 512, 512]


def test_another_make_in_the_folder_is_refused(tmp_path):
    MakeState(tmp_path, {"target": "a", "data": ["x"]}).finish("prompts", train=3)
    again = MakeState(tmp_path, {"target": "a", "data": ["x"]})
    assert again.of("prompts") == {"train": 3} and again.of("answers") is None
    with pytest.raises(
        ValueError, match=r"contains a make with target='a', but this call has 'b'. Use the same value to resume it"
    ):
        MakeState(tmp_path, {"target": "b", "data": ["x"]})


def test_more_than_an_hour_is_asked_about_on_a_terminal(monkeypatch):
    short, long = (Plan(seconds, 0.0, 0.0, 10, 2, 0, 0) for seconds in (60.0, 7200.0))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, started in (("y", True), ("", False)):
        monkeypatch.setattr("builtins.input", lambda text, answer=answer: answer)
        assert confirmed(long, False) is started and confirmed(long, True) and confirmed(short, False)
    assert prompts_within(None, 1.0) == 8 and prompts_within(10.0, 1.0) == 2 and prompts_within(36000.0, 0.01) == 8


def test_the_benchmark_fills_the_time_that_is_left():
    assert prompts_to_fill(100.0, 10.0, planned=2, most=16) == 8  # a share is kept back
    assert prompts_to_fill(1000.0, 10.0, planned=2, most=16) == 16
    assert prompts_to_fill(-5.0, 10.0, planned=2, most=16) == prompts_to_fill(None, 10.0, planned=2, most=16) == 2
    assert prompts_to_fill(100.0, 0.0, planned=2, most=16) == 2  # of an earlier call that noted no time


@pytest.mark.parametrize(("left", "count"), [(0.0, 2), (60.0, 4), (600.0, 5), (None, 2)])
def test_prompts_alike_are_benchmarked_where_time_is_left(folder, monkeypatch, left, count):
    """Of prompts of 2, 3, ... words: those that are at most twice as long as the planned ones."""
    target, tokenizer = make_target(), make_tokenizer()
    make_drafter(target).save_pretrained(folder / "drafter")
    words = [2, 3, 4, 5, 6, 60, 70]
    (folder / "held_out.jsonl").write_text(
        "".join(json.dumps({"prompt": " ".join(["w1"] * count)}) + "\n" for count in words)
    )
    making = measuring.Measuring()
    making.target, making.tokenizer, making.seed = target, tokenizer, 0
    making.held_out, making.drafter = folder / "held_out.jsonl", folder / "drafter"
    making.state = MakeState(folder / "made", {})
    # 16 seconds for two prompts of 4 x 32 tokens: 12 for one of 3 x 64
    making.state.finish("verification", seconds=8.0, different=0, answers=2)
    seen = []

    def run_benchmark(target, tokenizer, methods, prompts, *args):
        seen.extend(prompts)
        rows = [
            {"method": method.name, "benchmark": "all", "speedup": 1.0, "acceptance_length": 1.0} for method in methods
        ]
        return {"runs": rows}

    monkeypatch.setattr("coral_hf.evaluation.benchmark.run_benchmark", run_benchmark)
    making.benchmark(2, left)
    assert [len(prompt.turns[0].split()) for prompt in seen] == words[:count]


@pytest.mark.slow
def test_a_target_with_recurrent_layers(make, folder, monkeypatch):
    """After two hundred steps on a target with learnable text, more is accepted than from a random drafter."""
    target = make_hybrid("qwen3_5_text", torch.float32, "sdpa")
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if any(part in name for part in ("out_proj", "o_proj", "down_proj")):
                parameter.mul_(0.05)
    target.save_pretrained(folder / "target")
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(100)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(stages, "LONGEST_ANSWER", 48)
    trainer = stages.Making.trainer
    monkeypatch.setattr(
        stages.Making,
        "trainer",
        lambda self, folder, max_steps, **settings: trainer(self, folder, max_steps=max_steps and 200, **settings),
    )
    assert main([*make, "--tokens", "3000", "--yes"]) == 0
    assert stages_of(folder)["training"]["steps"] == 200
    accepted = {}
    for name, drafter in {
        "trained": AutoModel.from_pretrained(folder / "made" / "drafter").eval(),
        "random": make_drafter(target),
    }.items():
        pooled = DraftStats()
        for seed in range(4):
            ids = prompt_of(12, seed)
            plain = target.generate(ids, generation_config=config_of({}))
            drafted = target.generate(ids, generation_config=config_of(TREES["tree16"]), assistant_model=drafter)
            assert torch.equal(drafted, plain)
            pooled = pooled.merge(drafter.last_stats)
        accepted[name] = pooled.acceptance_length
    assert accepted["trained"] > accepted["random"] + 0.15, accepted
