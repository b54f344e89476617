"""`verify`: equal answers pass, the first unequal token is shown, and calls that cannot be checked are refused."""

import json

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf.cli import main
from coral_hf.data.prompts import Prompt, encode_context, read_prompts
from coral_hf.evaluation.benchmark import run_benchmark
from coral_hf.evaluation.draft_traces import record_traces
from coral_hf.evaluation.methods import Method, first_difference, measure
from coral_hf.evaluation.verify import verify
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tokens.token_choice import TokenChoice
from coral_hf.hub.card_tables import _check
from coral_hf.responses.regenerate import iter_prompts, regenerate


PROMPTS = [Prompt(f"p{i}", "abc" if i < 2 else "xyz", (f"w{i} w{i + 1}", "more")) for i in range(3)]
METHODS = ["coral", "chain:draft_depth=3", "stock:draft_top_k=1,draft_stock_loop=true"]


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_tokenizer(), make_drafter(target, draft_depth=3, draft_top_k=2)


@pytest.fixture
def wrong_choice(monkeypatch):
    """The drafted side takes a wrong token at the fifth place, as a broken verifier would."""
    begin, processed = TokenChoice.__init__, TokenChoice._processed

    def begin_apart(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._is_argmax, self.start = False, self.rows.lengths[0]

    def wrong_at_the_fifth(self, rows, raw):
        scores = processed(self, rows, raw)
        if self.rows.lengths[rows[0]] != self.start + 4:
            return scores
        with torch.random.fork_rng(devices=[]):  # the draw that follows is the same one
            drawn = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        right = drawn if self.do_sample else scores.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, (right + 1) % scores.shape[1], 0.0)

    monkeypatch.setattr(TokenChoice, "__init__", begin_apart)
    monkeypatch.setattr(TokenChoice, "_processed", wrong_at_the_fifth)


@pytest.mark.slow
def test_equal_answers(pair, tmp_path):
    target, tokenizer, drafter = pair
    methods = [Method.parse(text, drafter) for text in METHODS]
    checks = verify(target, tokenizer, methods, PROMPTS, 12, [0.0, 0.8, 1.5], output=tmp_path)
    # the stock loop draws other samples by design
    assert [(check.method.name, check.temperature) for check in checks] == [
        *((name, temperature) for name in ("coral", "chain") for temperature in (0.0, 0.8, 1.5)),
        ("stock", 0.0),
    ]
    assert not any(check.different or check.first for check in checks)
    record = json.loads((tmp_path / "check_coral.json").read_text())
    assert record["n_prompts"] == 3 and record["first_difference"] is None
    assert record["n_turns"] == record["identical"] == 6 and {row["n_turns"] for row in record["sampled"]} == {6}
    assert record["target"] == "" and record["target_revision"] is None
    assert set(record["acceptance_length"]) == {"all", "abc", "xyz"}
    assert record["settings"]["draft_depth"] == 3 and record["environment"]["dtype"] == "float64"
    assert [row["temperature"] for row in record["sampled"]] == [0.8, 1.5]
    record["drafter_sha256"] = "0" * 64  # this drafter was never on disk
    assert "Identity: 6 of 6 greedy answers of 12 tokens" in _check("check_coral.json", record)


def test_samples_differ_from_greedy_and_between_seeds(pair):
    """Otherwise equality of the samples would prove nothing."""
    target, _, drafter = pair
    ids = torch.tensor([[20, 30, 40]])
    answers = [measure(target, ids, 12, drafter, temperature=t, seed=s).new_ids for t, s in ((0, 0), (1, 0), (1, 1))]
    assert len({tuple(answer) for answer in answers}) == 3


def test_first_difference_is_shown(pair, wrong_choice, tmp_path):
    target, tokenizer, drafter = pair
    (check, sampled) = verify(target, tokenizer, [Method("coral", drafter)], PROMPTS, 12, [1.0], output=tmp_path)
    turns = [f"p{index}{turn}" for index in range(3) for turn in ("", ", turn 2")]
    assert check.different == sampled.different == turns
    first = check.first
    assert (first.prompt, first.turn, first.position, first.temperature) == ("p0", 1, 4, 0.0)
    assert first.drafted_token == (first.plain_token + 1) % 128
    text = str(first)
    for part in ("prompt p0", "new token 4", f"token {first.plain_token}", f"token {first.drafted_token}"):
        assert part in text
    assert first.plain_text in text and first.drafted_text in text
    record = json.loads((tmp_path / "check_coral.json").read_text())
    assert record["identical"] == 0 and record["first_difference"]["position"] == 4


def test_later_turns_follow_on_plain_answers(pair, wrong_choice, monkeypatch):
    """As in a benchmark, the text before a second turn does not depend on the method, which may be wrong."""
    target, tokenizer, drafter = pair
    asked = []

    def spy(target, ids, *args, **kwargs):
        asked.append((kwargs.get("drafter") is not None, tokenizer.decode(ids[0])))
        return measure(target, ids, *args, **kwargs)

    monkeypatch.setattr("coral_hf.evaluation.verify.measure", spy)
    (check,) = verify(target, tokenizer, [Method("coral", drafter)], PROMPTS[:1], 6)
    plain = tokenizer.decode(
        measure(target, encode_context(tokenizer, PROMPTS[0].turns[:1]), 6).new_ids, skip_special_tokens=True
    )
    assert [drafted for drafted, _ in asked] == [False, True] * 2
    assert asked[2][1] == asked[3][1] and asked[2][1].endswith(f"[a]{plain}[u]more[a]")
    assert check.different == ["p0", "p0, turn 2"] and (check.n_prompts, check.n_turns) == (1, 2)


def test_system_texts_and_chat_messages_are_measured_as_regenerate_answers_them(pair, tmp_path, monkeypatch):
    """Benchmark, verify and tune all measure a drafter on prompts rendered as in training."""
    target, tokenizer, drafter = pair
    chat = [("system", "be kind"), ("user", "hello"), ("assistant", "not to be said"), ("user", "and?")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in chat]},
        {"id": "b", "turns": ["hello", "and?"], "system": "be kind"},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts([tmp_path / "chats.jsonl"])
    assert [(prompt.id, prompt.turns, prompt.system) for prompt in prompts] == [
        (prompts[0].id, ("hello", "and?"), "be kind"),
        ("b", ("hello", "and?"), "be kind"),
    ]
    regenerate(target, tokenizer, iter_prompts(tmp_path / "chats.jsonl"), tmp_path / "out", max_new_tokens=6, slots=1)
    wanted = sorted(json.loads(line)["prompt_ids"] for line in (tmp_path / "out").read_text().splitlines())
    assert tokenizer("[s]be kind[u]hello[a]")["input_ids"] == wanted[0]
    asked: list[list[int]] = []

    def spy(target, ids, *args, **kwargs):
        asked.append(ids[0].tolist())
        return measure(target, ids, *args, **kwargs)

    for name in ("verify", "benchmark", "draft_traces"):
        monkeypatch.setattr(f"coral_hf.evaluation.{name}.measure", spy)
    methods = [Method("coral", drafter)]
    (check,) = verify(target, tokenizer, methods, prompts, 6)
    assert check.n_turns == 4 and sorted(asked) == sorted(2 * wanted)
    asked.clear()
    run_benchmark(target, tokenizer, methods, prompts, tmp_path / "bench", 6)
    assert sorted(asked) == sorted([wanted[0]] * 2 + 2 * wanted)  # plain and the drafter, each warmed up once
    asked.clear()
    record_traces(target, tokenizer, drafter, prompts, DraftSettings(draft_depth=2), 6)
    assert asked == [wanted[0]] * 4
    without = make_tokenizer("{{ raise_exception('no system') if messages[0]['role'] == 'system' }}")
    for measuring in (
        lambda: verify(target, without, methods, prompts, 6),
        lambda: run_benchmark(target, without, methods, prompts, tmp_path / "none", 6),
    ):
        with pytest.raises(ValueError, match="the target's chat template rejects the roles system, user"):
            measuring()
    assert not (tmp_path / "none").exists()


def test_an_answer_that_ends_early_differs_at_its_end():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 2]) == first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1


def test_refusals(pair):
    target, tokenizer, drafter = pair
    other = make_target("qwen2")
    cases = [
        (target, [Method("lookup", None, {"prompt_lookup_num_tokens": 3})], "verify checks drafters"),
        (other, [Method("coral", drafter)], "Load a drafter trained for this target"),
        (target, [Method("coral", drafter), Method("coral", drafter)], "a name of its own"),
        (target, [Method("tree", drafter, {"draft_total_tokens": 99})], "draft_total_tokens=99"),
        (target, [Method("router", drafter, {"draft_head": "router"})], "no router"),
    ]
    for model, methods, message in cases:
        with pytest.raises(ValueError, match=message):
            verify(model, tokenizer, methods, PROMPTS, 4)
    with pytest.raises(ValueError, match="at least 0"):
        verify(target, tokenizer, [Method("coral", drafter)], PROMPTS, 4, [-1.0])
    with pytest.raises(ValueError, match="finite"):
        verify(target, tokenizer, [Method("coral", drafter)], PROMPTS, 4, [float("nan")])
    with pytest.raises(ValueError, match="no prompts to measure"):
        verify(target, tokenizer, [Method("coral", drafter)], [], 4)
    named = make_drafter(target, target_vocab_hash="0" * 64)
    with pytest.raises(ValueError, match=r"vocabulary hash .* is not the drafter's"):
        verify(target, tokenizer, [Method("coral", named)], PROMPTS, 4)


def test_command(tmp_path, capsys, monkeypatch, request):
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    rows = "".join(json.dumps({"id": prompt.id, "turns": prompt.turns}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["verify", "--target", "target", "--drafter", "drafter", "--max-new-tokens", "8", "--limit", "2"]
    good = [*arguments, "--data", "prompts.jsonl", "--temperature", "0", "1", "--output", "records"]
    assert main(good) == 0
    assert "4/4" in capsys.readouterr().out
    record = json.loads((tmp_path / "records" / "check_coral.json").read_text())
    assert record["drafter"] == "drafter" and len(record["drafter_sha256"]) == 64
    assert main([*arguments, "--data", "empty.jsonl"]) == 2
    assert "contains no prompts" in capsys.readouterr().err
    assert main([*good, "--method", "fly"]) == 2
    assert "'fly' is unknown; choose coral, chain" in capsys.readouterr().err
    with monkeypatch.context() as nothing:  # whatever the reason: what was not compared is not equal
        nothing.setattr("coral_hf.evaluation.verify.answer_turns", lambda *args: None)
        assert main(good) == 1
        assert "error: method coral at temperature 1 was compared with nothing." in capsys.readouterr().out
    request.getfixturevalue("wrong_choice")
    assert main(good) == 1
    printed = capsys.readouterr().out
    assert "first difference: method coral, greedy, prompt p0, new token 4" in printed
    last = printed.strip().splitlines()[-1]
    assert last == "warning: 8 of 8 answers differ from plain generate's in float32, which must not happen."
