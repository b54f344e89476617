"""Prompts that the target writes itself: which are kept and which dropped, and that a killed run resumes."""

import json

import pytest
import torch
from helpers.tiny_models import make_target, make_tokenizer

from coral_hf.cli import main
from coral_hf.data.overlap import EvaluationPrompts
from coral_hf.responses import self_prompts
from coral_hf.responses.prompt_quality import NearDuplicates, flaw_of, language_of
from coral_hf.responses.self_prompts import prompt_start, self_prompts_path, write_self_prompts


TEMPLATE = "{% for m in messages %}<3>{{ m.content }}<2>{% endfor %}{% if add_generation_prompt %}<4>{% endif %}"
SUN, SEA, OWL = "What is the sun made of, and why?", "Tell me how the tides of the sea work.", "Do owls see at night?"
SAID = [SUN, "hi", SUN.upper(), "z" * 40, "How to bake bread at home?", "x y " * 30, SEA, OWL]


class Scripted:
    """Emits one text after the other, each with an end, regardless of the logits."""

    def __init__(self, texts, tokenizer):
        self.ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], 2]]

    def __call__(self, *_):
        return self if _ and isinstance(_[0], float) else torch.tensor([self.ids.pop(0)])


@pytest.fixture
def script(monkeypatch):
    def say(texts):
        monkeypatch.setattr(self_prompts, "TokenSampler", Scripted(texts, make_tokenizer()))

    return say


def test_what_is_kept_and_what_is_dropped(script, tmp_path, capsys):
    target, path = make_target(), tmp_path / "prompts.jsonl"
    script(SAID)
    how = {"slots": 1, "max_tokens": 60, "progress": False, "seed": 3}
    evaluation = EvaluationPrompts(["how to bake bread at home"])
    rows = write_self_prompts(target, make_tokenizer(TEMPLATE), 2, path, evaluation=evaluation, **how)
    assert [row["turns"] for row in rows] == [[SUN], [SEA]]
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["source"], row["seed"], row["temperature"]) for row in rows} == {("self", 3, 1.0)}
    assert all(row["target_weights"] for row in rows) and [row["id"] for row in rows] == ["self-3-0", "self-3-1"]
    told = capsys.readouterr().out
    assert "Self-made prompts: 2 of 2 kept; dropped: " in told and "Their languages: English 100%" in told
    for reason in ("2 empty", "1 duplicate", "1 degenerate", "1 in an evaluation file", "2 cut"):
        assert reason in told
    script([SUN, OWL])  # a later run reads the file
    longer = write_self_prompts(target, make_tokenizer(TEMPLATE), 3, path, **how)
    assert longer[:2] == rows and longer[2]["turns"] == [OWL]
    assert write_self_prompts(target, make_tokenizer(TEMPLATE), 2, path, **how) == rows, "nothing is written twice"
    with pytest.raises(ValueError, match=r"contains a response of .*, this run's target is"):
        write_self_prompts(make_target(seed=5), make_tokenizer(TEMPLATE), 3, path, **how)
    with pytest.raises(ValueError, match="self_prompts=0 must be at least 1"):
        write_self_prompts(target, make_tokenizer(TEMPLATE), 0, path)


def test_a_seed_gives_the_same_prompts(tmp_path):
    target, tokenizer = make_target(), make_tokenizer(None)
    tokenizer.bos_token = "<1>"
    files = [tmp_path / name for name in "abc"]
    for path, seed in zip(files, (0, 0, 1), strict=True):
        # most prompts of a random model contain special tokens and are dropped
        write_self_prompts(target, tokenizer, 2, path, slots=4, seed=seed, max_tokens=10, progress=False)
    texts = [[json.loads(line)["turns"] for line in path.read_text().splitlines()] for path in files]
    assert texts[0] == texts[1] != texts[2]


def test_where_a_users_words_begin():
    target = make_target()
    tokenizer = make_tokenizer(TEMPLATE)
    assert prompt_start(target, tokenizer) == ([3], frozenset({2}), "<2>")
    base = make_tokenizer(None)
    with pytest.raises(ValueError, match="neither a chat template nor a BOS or EOS token"):
        prompt_start(target, base)
    base.bos_token = "<1>"
    assert prompt_start(target, base) == ([1], frozenset(), None)


def test_texts_are_judged():
    assert [flaw_of(text) for text in ("", "1234567890", "a\ufffdbcdefghij", SUN)] == [
        "empty",
        "empty",
        "degenerate",
        None,
    ]
    assert (
        flaw_of("go " * 40)
        == flaw_of("aaaaaaaaaaaaaaaaaaaaaaaa b")
        == flaw_of("abc <2> defg", ["<2>"])
        == "degenerate"
    )
    known = NearDuplicates()
    known.add(SUN)
    assert SUN.lower() in known and SUN + "!" in known and SEA not in known
    languages = [language_of(text) for text in (SUN, "Was ist die Sonne?", "Что такое солнце?", "太阳是什么")]
    assert languages == ["English", "German", "Cyrillic", "Cjk"]


def test_the_command_answers_what_it_made(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_target(dtype=torch.float32).save_pretrained("target")
    make_tokenizer(TEMPLATE).save_pretrained("target")
    common = ["regenerate", "--target", "target", "--dtype", "float32", "--output", "out.jsonl"]
    for extra, message in (
        ([], "with --self_prompts N: one of the two"),
        (["--self-prompts", "2", "--prompts", "x"], "one of the two"),
        (["--self-prompts", "0"], "--self_prompts 0 must be at least 1"),
        (
            ["--self-prompts", "2", "--endpoint", "http://x/v1", "--endpoint-model", "m"],
            "NAME.prompts.jsonl with --prompts",
        ),
    ):
        assert main([*common, *extra]) == 2
        assert message in capsys.readouterr().err
    script([SUN, SEA])
    common += ["--max-new-tokens", "4", "--slots", "1"]
    assert main([*common, "--self-prompts", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {(row["id"], row["prompt"]) for row in rows} == {("self-0-0", SUN), ("self-0-1", SEA)}
    tokenizer = make_tokenizer()
    assert all(row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True) for row in rows)
    assert self_prompts_path("out.jsonl").name == "out.prompts.jsonl"
    assert main([*common, "--self-prompts", "2"]) == 0
    assert '"n_resumed": 2' in capsys.readouterr().out
    assert main([*common, "--prompts", "out.prompts.jsonl", "--output", "bare.jsonl", "--text", "false"]) == 0
    assert all("response" not in json.loads(line) for line in (tmp_path / "bare.jsonl").read_text().splitlines())
