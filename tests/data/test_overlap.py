"""Training prompts that are evaluation prompts."""

import json

import pytest
from helpers.tiny_models import make_tokenizer

from coral_hf.data import overlap
from coral_hf.data.chat import build_messages
from coral_hf.data.overlap import find_overlap, warn_of_overlap
from coral_hf.data.sources import RowStream


LONG = "Explain in detail how the tides of the sea follow from the pull of the moon and of the sun, step by step."
PROMPTS = ["Why is the sky blue, dear reader?", LONG, "Hi"]
CASES = [
    ("why is the sky  blue dear reader", "exact"),
    (LONG.upper().rstrip("."), "exact"),
    ("Why is the sky blue, dear reader? And the sea?", "prefix"),
    ("Why is the sky blue, dear readers of this?", None),
    (LONG[:100] + " in French", "prefix"),
    (LONG[:70], None),
    ("hi!", "exact"),
    ("Hi there, what is new?", None),
    ("", None),
]
TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}",
    "default system": "{% if messages[0].role != 'system' %}[s]Be good.[e] {% endif %}{% for m in messages %}[{{ m.role[0] }}]"
    " {{ m.content }}[e]  {% endfor %}{% if add_generation_prompt %}[a] {% endif %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>"
    "{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}


@pytest.mark.parametrize(("turn", "kind"), CASES)
def test_whole_prompts_and_beginnings(turn, kind):
    for row in (
        {"turns": ["first", turn], "responses": ["x", "y"]},
        {"messages": [*build_messages(["a", turn], ["x", "y"])]},
    ):
        found = find_overlap([row], PROMPTS)
        assert (found.exact, found.prefix) == (int(kind == "exact"), int(kind == "prefix"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be kind"])
def test_rows_of_ids_are_read_through_the_template(template, system):
    if template == "no system" and system is not None:
        return
    tokenizer = make_tokenizer(TEMPLATES[template])
    messages = build_messages(["Something else", PROMPTS[0]], ["no matter"], system)
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    found = find_overlap([{"id": "a", "prompt_ids": ids, "response_ids": [14]}], PROMPTS, tokenizer)
    assert (found.exact, found.prefix, found.unreadable) == (1, 0, 0)
    assert found.examples == [("a", PROMPTS[0])]
    unread = find_overlap([{"prompt_ids": ids[:3], "response_ids": [14]}], PROMPTS, tokenizer)
    assert unread.unreadable == 1


def test_the_warning_counts_and_names(tmp_path, capsys):
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"id": str(index), "turns": [p]}) + "\n" for index, p in enumerate(PROMPTS)))
    rows = [{"id": f"r{index}", "turns": [turn]} for index, (turn, _) in enumerate(CASES)]
    warn_of_overlap(rows, [str(path)])
    output = capsys.readouterr().out
    assert output.startswith("warning: 5 of 9 training conversations contain a prompt of ") and "eval.jsonl" in output
    assert "(3 exactly, 2 by its beginning), such as 'r0'" in output
    warn_of_overlap(rows[3:4], [str(path)])
    assert capsys.readouterr().out == ""
    warn_of_overlap([{"prompt_ids": [14], "response_ids": [14]}], [str(path)])  # ids, and no tokenizer to read them
    assert capsys.readouterr().out.startswith("warning: in 1 of 1 training conversations no user turn was found")


def test_a_stream_is_read_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "STREAM_ROWS", 2)
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(index), "turns": [p], "responses": ["x"]} for index, p in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = warn_of_overlap(RowStream(path), [str(path)])
    assert (found.checked, found.exact) == (2, 2)


def test_without_marks_of_a_turn_the_whole_text_is_the_prompt():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt_ids": tokenizer(PROMPTS[0])["input_ids"], "response_ids": [14]}
    for rows, reader in (([row], tokenizer), ([{"text": PROMPTS[0]}], None)):
        assert find_overlap(rows, PROMPTS, reader).exact == 1
