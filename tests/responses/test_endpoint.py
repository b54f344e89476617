"""Regeneration by a server, over real HTTP with a small server on the loopback address."""

import json

import pytest
from helpers.chat_server import serve
from helpers.thinking_templates import thinking_tokenizer
from helpers.tiny_models import make_tokenizer

from coral_hf.cli import main
from coral_hf.data.dataset import ConversationDataset, encode_row, read_rows
from coral_hf.responses.endpoint import ChatEndpoint, regenerate_from_endpoint


PROMPTS = [{"id": f"p{index}", "turns": [f"q{index}", "more", "again"][: 1 + index % 3]} for index in range(9)]
PROMPTS[4]["system"] = "be kind"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve() as running:
        yield running


def ask(server, prompts, output, **settings):
    settings = {"max_new_tokens": 40, "progress": False, "pause": 0.01, "concurrency": 3, **settings}
    return regenerate_from_endpoint(server.url, "big-model", prompts, output, **settings)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path):
    """The answers in the file, by id and turn, each once."""
    found = {}
    for row in read(path):
        first = row.get("first_turn", row.get("turn", 0))
        for turn, text in enumerate(row["responses"][first:] if "turns" in row else [row["response"]], first):
            assert (row["id"], turn) not in found
            found[row["id"], turn] = text
    return found


def test_texts_of_whole_conversations(server, tmp_path):
    output, server.pause = tmp_path / "out.jsonl", 0.05
    stats = ask(server, PROMPTS, output)
    rows = {row["id"]: row for row in read(output)}
    assert len(rows) == len(read(output)) == 9 and stats["n_responses"] == 18
    for prompt in PROMPTS:
        row, system = rows[prompt["id"]], "system" in prompt
        assert row["turns"] == prompt["turns"] and row.get("system") == prompt.get("system")
        assert row["responses"] == [f"echo({t})#{2 * i + 1 + system}" for i, t in enumerate(prompt["turns"])]
        assert row["finish_reasons"] == ["stop"] * len(prompt["turns"])
    assert stats["n_response_tokens"] == sum(len(text) for row in rows.values() for text in row["responses"])
    second = next(body for body in server.requests if len(body["messages"]) == 3)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == f"echo({second['messages'][0]['content']})#1"
    assert (second["model"], second["max_tokens"], second["temperature"]) == ("big-model", 40, 0.0)
    assert 1 < server.most_busy <= 3
    dataset = ConversationDataset(read_rows(output), make_tokenizer())
    assert dataset.num_response_tokens == stats["n_response_tokens"]
    asked = len(server.requests)
    assert ask(server, PROMPTS, output)["n_resumed"] == 18 and len(server.requests) == asked


def test_token_ids_turn_by_turn(server, tmp_path):
    output = tmp_path / "out.jsonl"
    ask(server, PROMPTS, output, token_ids=True, temperature=0.5, seed=7, max_turns=1)
    ask(server, PROMPTS, output, token_ids=True, temperature=0.5, seed=7)
    rows = {(row["id"], row["turn"]): row for row in read(output)}
    assert len(rows) == len(read(output)) == 18
    row = rows["p2", 1]
    assert row["response"] == "echo(more)#3" and row["response_ids"] == [ord(letter) for letter in row["response"]]
    assert row["prompt_ids"][0] == 1 and row["temperature"] == 0.5
    assert all(body["seed"] == 7 and body["return_token_ids"] for body in server.requests)
    assert len(ConversationDataset(read_rows(output))) == 18


def test_cut_answers_are_marked(server, tmp_path):
    ask(server, PROMPTS[:1], tmp_path / "out.jsonl", max_new_tokens=4)
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["responses"], row["finish_reasons"]) == (["echo"], ["length"])


def test_reasoning_that_the_server_takes_out_is_kept_beside_the_texts(server, tmp_path):
    server.reasons = True
    ask(server, PROMPTS[:3], tmp_path / "out.jsonl", max_turns=1)
    ask(server, PROMPTS[:3], tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    assert [row["reasonings"] for row in rows if row["id"] == "p2"] == [
        ["let me think"],
        [None] + ["let me think"] * 2,
    ]
    assert all("reasoning" not in message for body in server.requests for message in body["messages"])
    tokenizer = thinking_tokenizer("qwen3")
    dataset = ConversationDataset(read_rows(tmp_path / "out.jsonl"), tokenizer)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in dataset.conversations]
    assert len(texts) == 6 and all(text.startswith("<think> let me think </think> echo(") for text in texts)
    ask(server, PROMPTS, tmp_path / "ids.jsonl", token_ids=True)
    assert all("reasonings" not in row for row in read(tmp_path / "ids.jsonl"))


def test_answers_that_training_cannot_use_end_a_run_early(server, tmp_path):
    prompts = [{"id": f"p{index}", "turns": [f"q{index}"]} for index in range(40)]
    with pytest.raises(ValueError, match=r"prompt 'p\d+', turn 0: .*thinking.*the row has none.*--endpoint_token_ids"):
        ask(server, prompts, tmp_path / "out.jsonl", tokenizer=thinking_tokenizer("deepseek_r1"))
    assert len(server.requests) < 15
    server.reasons = True  # what it takes out it gives apart
    stats = ask(server, prompts, tmp_path / "good.jsonl", tokenizer=thinking_tokenizer("deepseek_r1"))
    assert (stats["n_responses"], stats["n_unusable"]) == (40, 0)
    server.reasons = False
    stats = ask(server, PROMPTS, tmp_path / "qwen.jsonl", tokenizer=thinking_tokenizer("qwen3"))
    assert (stats["n_responses"], stats["n_unusable"]) == (18, 0)
    assert ConversationDataset(read_rows(tmp_path / "qwen.jsonl"), thinking_tokenizer("qwen3")).num_response_tokens


def test_the_mode_is_sent_and_kept(server, tmp_path):
    output, off = tmp_path / "out.jsonl", {"enable_thinking": False}
    prompts = [PROMPTS[0], {**PROMPTS[1], "chat_template_kwargs": {"enable_thinking": True}}]
    ask(server, prompts, output, template_kwargs=off)
    modes = {body["messages"][0]["content"]: body["chat_template_kwargs"] for body in server.requests}
    assert modes == {"q0": off, "q1": {"enable_thinking": True}}
    assert {row["id"]: row["chat_template_kwargs"]["enable_thinking"] for row in read(output)} == {
        "p0": False,
        "p1": True,
    }
    assert ask(server, prompts, output, template_kwargs=off)["n_responses"] == 0
    with pytest.raises(
        ValueError, match=r"'p0' is answered on file with chat_template_kwargs .*, but this run has \{\}; give"
    ):
        ask(server, prompts, output)


def test_conversations_that_end_early_are_counted(server, tmp_path):
    prompts = [{"id": "a", "turns": ["ok", "too long", "never"]}, {"id": "b", "turns": ["mute"]}]
    stats = ask(server, prompts, tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["id"], row["turns"], len(row["responses"])) == ("a", ["ok"], 1)
    assert (stats["n_too_long"], stats["n_empty"], stats["n_responses"]) == (1, 1, 1)


def test_faults_are_tried_again(server, tmp_path):
    server.faults = [503, "cut", 429, 500, "cut"]
    stats = ask(server, PROMPTS, tmp_path / "out.jsonl")
    assert stats["n_responses"] == 18 and len(server.requests) == 23


@pytest.mark.parametrize("token_ids", [False, True])
def test_a_server_that_dies_leaves_a_file_to_go_on_with(server, tmp_path, token_ids):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    server.dies_after = 11
    with pytest.raises(ConnectionError, match=r"gave no answer in 3 attempts \(HTTP 503.*same command again") as error:
        ask(server, PROMPTS, output, attempts=3, token_ids=token_ids)
    kept = output.read_bytes()
    assert f"{len(answers(output))} new answers are in" in str(error.value)
    assert len(answers(output)) == 11, "every answer that came is kept"
    output.write_bytes(kept + b'{"id":"p8","tur')  # and a kill in the middle of a line
    server.dies_after = None
    assert ask(server, PROMPTS, output, token_ids=token_ids)["n_responses"] == 7
    assert output.read_bytes().startswith(kept)
    ask(server, PROMPTS, whole, token_ids=token_ids)
    assert answers(output) == answers(whole)
    tokens = [ConversationDataset(read_rows(file), make_tokenizer()).num_response_tokens for file in (output, whole)]
    assert tokens[0] == tokens[1], "each answer is trained once"


def test_more_turns_of_conversations_on_file(server, tmp_path):
    output = tmp_path / "out.jsonl"
    ask(server, PROMPTS, output, max_turns=1)
    stats = ask(server, PROMPTS, output)
    assert (stats["n_resumed"], stats["n_responses"]) == (9, 9)
    row = next(row for row in read(output) if row["id"] == "p8" and len(row["turns"]) == 3)
    assert row["responses"] == ["echo(q8)#1", "echo(more)#3", "echo(again)#5"] and row["first_turn"] == 1
    assert row["finish_reasons"] == [None, "stop", "stop"]
    ids, mask = encode_row(row, make_tokenizer())
    assert (
        make_tokenizer().decode([token for token, on in zip(ids, mask, strict=True) if on])
        == "echo(more)#3echo(again)#5"
    )
    asked = len(server.requests)
    assert ask(server, PROMPTS, output)["n_responses"] == 0 and len(server.requests) == asked
    for changed in ({"turns": ["q8", "other", "again"]}, {"system": "be brief"}):
        with pytest.raises(ValueError, match=r"prompt 'p8' differs from the one .* on file: give"):
            ask(server, [{**PROMPTS[8], **changed}], output)
    with pytest.raises(ValueError, match="here: first_turn must be a number from 0 to its 3 responses; got 7"):
        encode_row({**row, "first_turn": 7}, make_tokenizer(), "here")


def test_a_failure_keeps_the_turns_before_it(server, tmp_path):
    server.dies_after, server.pause = 3, 0.05
    conversations = [{"id": f"c{index}", "turns": ["a", "b"]} for index in range(3)]
    with pytest.raises(ConnectionError, match="3 new answers are in"):
        ask(server, conversations, tmp_path / "out.jsonl", attempts=1)
    assert [row["responses"] for row in read(tmp_path / "out.jsonl")] == [["echo(a)#1"]] * 3


def test_an_unreachable_endpoint_is_a_clear_error(tmp_path):
    with serve() as gone:
        pass
    with pytest.raises(
        ConnectionError, match=r"gave no answer in 2 attempts .*0 new answers are in .*start the server"
    ):
        ask(gone, PROMPTS, tmp_path / "out.jsonl", attempts=2)


def test_what_cannot_be_mended_by_asking_again(server, tmp_path):
    server.faults = [401]
    with pytest.raises(ValueError, match=r"rejected a request for model 'big-model' .HTTP 401: .*fault 401"):
        ask(server, PROMPTS, tmp_path / "out.jsonl", concurrency=1)
    server.faults = ["garbage"]
    with pytest.raises(ValueError, match="did not return a chat completion"):
        ask(server, PROMPTS, tmp_path / "out.jsonl", concurrency=1)
    server.token_ids = False
    with pytest.raises(ValueError, match="returned no token ids"):
        ask(server, PROMPTS, tmp_path / "ids.jsonl", token_ids=True)
    with pytest.raises(ValueError, match="must be a URL such as"):
        ChatEndpoint("localhost:8000", "m")
    for wrong, message in (
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"temperature": -0.5}, r"temperature must be 0 .greedy. or positive and finite, got -0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(server, PROMPTS, tmp_path / "never.jsonl", **wrong)
    ask(server, PROMPTS[:2], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"line 1 contains a response at temperature 0\.0, this run has 0\.5"):
        ask(server, PROMPTS, tmp_path / "out.jsonl", temperature=0.5)
    with pytest.raises(ValueError, match="contains a response of big-model, this run's target is OTHER; give"):
        regenerate_from_endpoint(server.url, "OTHER", PROMPTS, tmp_path / "out.jsonl", progress=False)
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1 is not a row of such a run"):
        ask(server, PROMPTS, tmp_path / "out.jsonl", token_ids=True)


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    arguments = ["regenerate", "--prompts", "prompts.jsonl", "--output", "out.jsonl", "--max-new-tokens", "40"]
    assert main([*arguments, "--endpoint", server.url]) == 2
    assert "go together" in capsys.readouterr().err
    arguments += ["--endpoint", server.url, "--endpoint-model", "big-model"]
    assert main([*arguments, "--shards", "shards"]) == 2
    assert "--endpoint_token_ids true" in capsys.readouterr().err
    for option, value in (("slots", "8"), ("max_prompt_tokens", "99"), ("dtype", "float32"), ("device", "cpu")):
        assert main([*arguments, f"--{option}", value]) == 2
        assert f"--{option} {value} is for --target, but --endpoint" in capsys.readouterr().err
    arguments += ["--check-overlap", "prompts.jsonl"]
    assert main([*arguments, "--endpoint-token-ids", "true", "--shards", "shards"]) == 0
    assert "warning: 9 of 9" in capsys.readouterr().out
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert len(read_rows("shards")) == 18
    server.dies_after = 0
    assert main([*arguments[:4], "new.jsonl", *arguments[5:], "--endpoint-attempts", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("coral-hf regenerate: ") and "run the same command again" in error


def test_the_named_target_checks_what_the_command_gets(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"p{index}", "turns": [f"q{index}"]} for index in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    thinking_tokenizer("deepseek_r1").save_pretrained("target")
    arguments = ["regenerate", "--prompts", "prompts.jsonl", "--output", "out.jsonl", "--max-new-tokens", "40"]
    arguments += ["--endpoint", server.url, "--endpoint-model", "big-model", "--endpoint-concurrency", "1"]
    assert main([*arguments, "--target", "target"]) == 2
    assert "and the row has none" in capsys.readouterr().err and len(server.requests) < 12
    assert main(arguments) == 0
    assert "note: no tokenizer was found under the name 'big-model'" in capsys.readouterr().out
