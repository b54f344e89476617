"""Regeneration: the same tokens as plain `generate`, nothing lost or repeated over kills, shards with every row."""

import json
import os
import random

import pytest
import torch
from helpers.chat_server import serve
from helpers.tiny_models import FAMILIES, make_target, make_tokenizer

from coral_hf.generation.key_values.store import BLOCK
from coral_hf.responses import response_files
from coral_hf.responses.endpoint import regenerate_from_endpoint
from coral_hf.responses.regenerate import iter_prompts, regenerate, write_shards


EOS_IDS = list(range(2, 14))  # many, so that random models end some answers early


def make_prompts(n=24, longest=30, max_turns=3, seed=0):
    rng = random.Random(seed)
    text = lambda: "".join(chr(rng.randint(97, 122)) for _ in range(rng.randint(1, longest)))  # noqa: E731
    return [{"id": f"p{index}", "turns": [text() for _ in range(rng.randint(1, max_turns))]} for index in range(n)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keyed(path):
    rows = read(path)
    keys = {(row["id"], row["turn"]): row["response_ids"] for row in rows}
    assert len(keys) == len(rows), "a turn was answered twice"
    return keys


def plain(target, prompt_ids, max_new_tokens):
    ids = torch.tensor([prompt_ids])
    output = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(prompt_ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_greedy_equals_plain_generate(family, attention, tmp_path):
    target = make_target(family, attention=attention)
    target.generation_config.eos_token_id = EOS_IDS
    output = tmp_path / "out.jsonl"
    # Prompts past the sliding windows of 16, more of them than slots.
    stats = regenerate(target, make_tokenizer(), make_prompts(10), output, max_new_tokens=20, slots=4, progress=False)
    rows = read(output)
    assert stats["n_responses"] == len(rows) == sum(len(row["turns"]) for row in make_prompts(10))
    assert target.config._attn_implementation == attention
    for row in rows:
        assert row["response_ids"] == plain(target, row["prompt_ids"], 20)
    lengths = {len(row["response_ids"]) for row in rows}
    assert len(lengths) > 1, "answers of one length do not test the slots"


def test_answers_end_with_eos_or_at_the_limit(target, tmp_path):
    target.generation_config.eos_token_id = EOS_IDS
    regenerate(target, make_tokenizer(), make_prompts(), tmp_path / "out", max_new_tokens=12, slots=5, progress=False)
    rows = read(tmp_path / "out")
    ended = [row for row in rows if row["response_ids"][-1] in EOS_IDS]
    assert 0 < len(ended) < len(rows)
    for row in rows:
        assert not set(row["response_ids"][:-1]) & set(EOS_IDS)
        assert row in ended or len(row["response_ids"]) == 12


def test_each_turn_holds_the_answers_before_it(target, tmp_path):
    target.generation_config.eos_token_id = EOS_IDS
    tokenizer, output = make_tokenizer(), tmp_path / "out.jsonl"
    prompts = make_prompts()
    regenerate(target, tokenizer, prompts, output, max_new_tokens=8, slots=4, progress=False)
    turns = {row["id"]: row["turns"] for row in prompts}
    answers = {}
    for row in read(output):  # file order: a turn comes after the earlier ones
        before = answers.setdefault(row["id"], [])
        assert row["turn"] == len(before)
        messages = []
        for turn, answer in zip(turns[row["id"]], [*before, None], strict=False):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row["prompt_ids"] == list(expected)
        before.append(row["response_ids"])
    assert {key: len(value) for key, value in answers.items()} == {key: len(value) for key, value in turns.items()}


def test_without_a_chat_template_the_prompt_is_the_text(target, tmp_path):
    tokenizer, output = make_tokenizer(chat_template=None), tmp_path / "out.jsonl"
    prompts = [{"id": "a", "turns": ["hello"]}]
    regenerate(target, tokenizer, prompts, output, max_new_tokens=4, slots=2, progress=False)
    assert read(output)[0]["prompt_ids"] == tokenizer("hello")["input_ids"]


def test_system_texts_and_chat_messages_as_prompts(target, tmp_path):
    path, output, tokenizer = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", make_tokenizer()
    chat = [("system", "be kind"), ("user", "hello"), ("assistant", "to say again"), ("user", "and?")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in chat]},
        {"id": "b", "turns": ["hello", "and?"], "system": "be kind"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    regenerate(target, tokenizer, iter_prompts(path), output, max_new_tokens=4, slots=2, progress=False)
    found = {(row["id"], row["turn"]): row["prompt_ids"] for row in read(output)}
    (made,) = {name for name, _ in found} - {"b"}
    assert set(found) == {(made, 0), (made, 1), ("b", 0), ("b", 1)}
    assert found[made, 0] == found["b", 0] == tokenizer("[s]be kind[u]hello[a]")["input_ids"]
    assert found[made, 1] == found["b", 1]
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "3"}]}))
    with pytest.raises(ValueError, match="line 1: messages of role tool cannot be answered again"):
        list(iter_prompts(path))


def test_prompt_of_one_token(target, tmp_path):
    output = tmp_path / "out.jsonl"
    prompts = [{"id": "a", "turns": ["x"]}, {"id": "b", "turns": ["longer"]}]
    regenerate(target, make_tokenizer(None), prompts[:1], output, max_new_tokens=6, slots=1, progress=False)
    regenerate(target, make_tokenizer(None), prompts, output, max_new_tokens=6, slots=1, progress=False)
    for row in read(output):
        assert row["response_ids"] == plain(target, row["prompt_ids"], 6)


@pytest.mark.parametrize("cut", ["between", "mid_line", "mid_character", "first_line"])
def test_resumes_after_a_kill_without_losing_or_repeating(target, tmp_path, cut):
    target.generation_config.eos_token_id = EOS_IDS
    tokenizer, whole, output = make_tokenizer(), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = {"max_new_tokens": 8, "slots": 4, "progress": False}
    regenerate(target, tokenizer, make_prompts(), whole, **arguments)
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = lines[: len(lines) // 2]
    torn = {"between": b"", "mid_line": lines[len(kept)][:-9], "mid_character": b'{"id":"\xc3', "first_line": b""}[cut]
    if cut == "first_line":
        kept, torn = [], lines[0][:5]
    output.write_bytes(b"".join(kept) + torn)
    stats = regenerate(target, tokenizer, make_prompts(), output, **arguments)
    assert output.read_bytes().startswith(b"".join(kept))
    assert keyed(output) == keyed(whole)
    assert stats["n_resumed"] == len(kept) and stats["n_responses"] == len(lines) - len(kept)
    # A run with nothing left to do changes nothing.
    before = output.read_bytes()
    assert regenerate(target, tokenizer, make_prompts(), output, **arguments)["n_responses"] == 0
    assert output.read_bytes() == before


def test_max_turns_then_the_rest(target, tmp_path):
    tokenizer, whole, output = make_tokenizer(), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = {"max_new_tokens": 6, "slots": 4, "progress": False}
    regenerate(target, tokenizer, make_prompts(), whole, **arguments)
    regenerate(target, tokenizer, make_prompts(), output, max_turns=1, **arguments)
    assert {row["turn"] for row in read(output)} == {0}
    regenerate(target, tokenizer, make_prompts(), output, **arguments)
    assert keyed(output) == keyed(whole)


def test_left_out_prompts_are_counted(target, tmp_path):
    prompts = [{"id": "short", "turns": ["ab", "y" * 40]}, {"id": "long", "turns": ["x" * 40, "z"]}]
    prompts.append({"id": "elsewhere", "turns": ["cd"]})
    stats = regenerate(
        target, make_tokenizer(), prompts, tmp_path / "out", max_new_tokens=4, max_prompt_tokens=20, slots=2,
        exclude={"elsewhere"}, progress=False,
    )  # fmt: skip
    assert [(row["id"], row["turn"]) for row in read(tmp_path / "out")] == [("short", 0)]
    assert stats["n_excluded"] == 1 and stats["n_too_long"] == 2
    assert {entry[:2] for entry in stats["too_long"]} == {("short", 1), ("long", 0)}


def test_sampling_is_seeded_recorded_and_kept_apart(target, tmp_path):
    arguments = {"max_new_tokens": 8, "slots": 4, "progress": False}
    tokenizer, prompts = make_tokenizer(), make_prompts(6)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        regenerate(target, tokenizer, prompts, tmp_path / name, temperature=0.8, seed=seed, **arguments)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert keyed(tmp_path / "a") != keyed(tmp_path / "c")
    assert all(row["temperature"] == 0.8 for row in read(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"temperature 0\.8, this run has 0\.0"):
        regenerate(target, tokenizer, prompts, tmp_path / "a", **arguments)


def test_sampler_follows_the_softmax():
    from coral_hf.responses.regenerate import TokenSampler

    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    counts = torch.bincount(TokenSampler(0.5, 0, torch.device("cpu"))(logits), minlength=3) / 20000
    assert torch.allclose(counts, torch.softmax(logits[0] / 0.5, -1), atol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"max_new_tokens": 512}, "exceed the 512 positions"),
        ({"temperature": -0.5}, r"temperature must be 0 .* got -0\.5"),
        ({"temperature": float("nan")}, r"positive and finite, got nan"),
        ({"max_prompt_tokens": 600}, "exceed the 512 positions"),
    ],
)
def test_settings_out_of_range(target, tmp_path, settings, message):
    settings = {"max_new_tokens": 8, "progress": False, **settings}
    with pytest.raises(ValueError, match=message):
        regenerate(target, make_tokenizer(), make_prompts(2), tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_targets_that_do_not_fit(target, tmp_path):
    with pytest.raises(ValueError, match="training mode"):
        regenerate(target.train(), make_tokenizer(), [], tmp_path / "out", max_new_tokens=4)
    target.eval().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        regenerate(target, make_tokenizer(), [], tmp_path / "out", max_new_tokens=4)
    target.config._attn_implementation = "sdpa"
    target.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"encoder-decoder .llama.; give a decoder-only model"):
        regenerate(target, make_tokenizer(), [], tmp_path / "out", max_new_tokens=4)
    target.config.is_encoder_decoder = False
    target.config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(ValueError, match="chunked_attention"):
        regenerate(target, make_tokenizer(), [], tmp_path / "out", max_new_tokens=4)


def test_prompts_that_cannot_be_answered(target, tmp_path):
    twice = [{"id": "a", "turns": ["x"]}, {"id": "a", "turns": ["y"]}]
    with pytest.raises(ValueError, match="prompt id 'a' occurs twice"):
        regenerate(target, make_tokenizer(), twice, tmp_path / "out", max_new_tokens=4, progress=False)
    with pytest.raises(ValueError, match="prompt 'a' has no tokens"):
        empty = [{"id": "a", "turns": [""]}]
        tokenizer = make_tokenizer(chat_template=None)
        regenerate(target, tokenizer, empty, tmp_path / "other", max_new_tokens=4, progress=False)


def test_buffers_grow_with_the_longest_row(target, tmp_path):
    """Beyond the buffer's first size in the middle of an answer."""
    prompts = [{"id": "long", "turns": ["x" * (BLOCK - 10)]}, {"id": "short", "turns": ["y"]}]
    regenerate(target, make_tokenizer(), prompts, tmp_path / "out", max_new_tokens=20, slots=2, progress=False)
    for row in read(tmp_path / "out"):
        assert row["response_ids"] == plain(target, row["prompt_ids"], 20)


def test_answers_of_another_target_do_not_mix(target, tmp_path):
    output, arguments = tmp_path / "out.jsonl", {"slots": 4, "progress": False}
    target.config._commit_hash, target.config._name_or_path = "aaaa", "org/name"
    prompts = make_prompts(3, max_turns=1)
    regenerate(target, make_tokenizer(), prompts[:1], output, max_new_tokens=6, **arguments)
    (row,) = read(output)
    assert (row["target"], row["target_revision"], len(row["target_weights"])) == ("org/name", "aaaa", 12)
    other = make_target(seed=5)
    named = rf"contains a response of org/name at revision aaaa .weights {row['target_weights']}., this run's target is .*; give"
    with pytest.raises(ValueError, match=named):
        regenerate(other, make_tokenizer(), prompts, output, max_new_tokens=9, **arguments)
    same = make_target(dtype=torch.bfloat16)  # in another dtype, and from a folder
    same.config._name_or_path = str(tmp_path)
    regenerate(same, make_tokenizer(), prompts[:2], output, max_new_tokens=6, **arguments)
    assert [row["target"] for row in read(output)] == ["org/name", tmp_path.name]
    same.config._commit_hash = "bbbb"
    with pytest.raises(ValueError, match="or continue with --target_revision aaaa"):
        regenerate(same, make_tokenizer(), prompts, output, max_new_tokens=6, **arguments)
    for row in (rows := read(output)):  # as earlier versions wrote them
        for name in ("target", "target_revision", "target_weights", "prompt_hash"):
            row.pop(name, None)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stats = regenerate(other, make_tokenizer(), prompts, output, max_new_tokens=6, **arguments)
    assert (stats["n_resumed"], stats["n_responses"]) == (2, 1)


def test_a_changed_prompt_does_not_go_on_from_the_old_answer(target, tmp_path):
    arguments = {"max_new_tokens": 4, "slots": 2, "progress": False}
    prompt, output = {"id": "a", "turns": ["hello", "and"]}, tmp_path / "out.jsonl"
    regenerate(target, make_tokenizer(), [prompt], output, max_turns=1, **arguments)
    for changed in ({"turns": ["hullo", "and"]}, {"system": "be kind"}):
        with pytest.raises(ValueError, match="prompt 'a' differs from the one whose turn 0 is answered"):
            regenerate(target, make_tokenizer(), [{**prompt, **changed}], output, **arguments)
    assert regenerate(target, make_tokenizer(), [prompt], output, **arguments)["n_responses"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that takes nothing")
@pytest.mark.parametrize("endpoint", [False, True])
def test_a_full_disk_says_how_to_go_on(target, tmp_path, monkeypatch, endpoint):
    opened, output = response_files.AnswerWriter.__init__, tmp_path / "out.jsonl"

    def open_full(self, *args):
        opened(self, *args)
        self.file = open("/dev/full", "a")  # noqa: SIM115  (the writer closes it)

    monkeypatch.setattr(response_files.AnswerWriter, "__init__", open_full)
    message = r"out.jsonl could not be written .* No space left on device.*run the same command again"
    with serve() as server, pytest.raises(OSError, match=message):
        if endpoint:
            regenerate_from_endpoint(server.url, "model", make_prompts(3), output, progress=False)
        else:
            regenerate(target, make_tokenizer(), make_prompts(3), output, max_new_tokens=4, progress=False)


def test_one_writer_at_a_time(target, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "out.lock"), pytest.raises(ValueError, match="another process is writing"):
        regenerate(target, make_tokenizer(), make_prompts(2), tmp_path / "out", max_new_tokens=4, progress=False)


def test_shards_round_trip_and_extend(target, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output, shards = tmp_path / "out.jsonl", tmp_path / "shards"
    regenerate(target, make_tokenizer(), make_prompts(), output, max_new_tokens=6, slots=4, text=False, progress=False)
    rows = read(output)
    paths = write_shards(output, shards, rows_per_shard=20)
    assert [path.name for path in paths] == [f"responses-{index:05d}.parquet" for index in range(-(-len(rows) // 20))]
    back = [row for path in paths for row in parquet.read_table(path).to_pylist()]
    assert back == [{**row, "temperature": 0.0} for row in rows]
    assert str(parquet.read_schema(paths[0]).field("response_ids").type) == "list<element: uint16>"
    assert write_shards(output, shards) == []  # all packed already
    large = [{"id": "big", "prompt_ids": [70000], "response_ids": [1], "turn": 0, "temperature": 0.5}]
    (more,) = write_shards(large, shards)
    assert more.name == f"responses-{len(paths):05d}.parquet"
    assert parquet.read_table(more).to_pylist() == [
        {**large[0], **dict.fromkeys(("target", "target_weights", "prompt_hash"))}
    ]
    assert sorted(path.name for path in shards.iterdir()) == sorted(path.name for path in [*paths, more])
