"""`coral-hf serve` through the `openai` client: the texts of plain `generate`, streamed or not, for one client or two."""

import json
import socket
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf import attach
from coral_hf.cli import main
from coral_hf.generation.attachment import attachment_of
from coral_hf.utils import compat
from coral_hf.utils.compat import openai_server


MESSAGES = [{"role": "user", "content": "w3 w4 w5"}]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
NAME = "tiny"


def test_continuous_batching_and_odd_ports_are_refused(capsys):
    assert main(["serve", "--continuous-batching", "true"]) == 2
    assert "does not call generate" in capsys.readouterr().err
    assert main(["serve", "--port", "0"]) == 2
    assert "--port 0 must be between" in capsys.readouterr().err


def test_another_form_of_the_server_is_named(monkeypatch):
    serve = pytest.importorskip("transformers.cli.serve", reason="Transformers' server needs its `serving` extra")
    monkeypatch.setattr(serve, "Serve", type("Serve", (), {"__init__": lambda self, model: None}))
    with pytest.raises(ValueError, match=r"missing: Serve\(force_model\), Serve\(host\)"):
        openai_server(None, None, NAME)


def test_the_verb_serves_what_it_is_given(folder, monkeypatch, capsys):
    made = {}

    def server(model, tokenizer, name):
        made.update(model=model, tokenizer=tokenizer, name=name)
        return made.update

    monkeypatch.setattr("coral_hf.commands.serve.require", lambda *_, **__: None)
    monkeypatch.setattr(compat, "openai_server", server)
    target, drafter = str(folder / "target"), str(folder / "drafter")
    arguments = ["--target", target, "--drafter", drafter, "--dtype", "float32", "--device", "cpu", "--port", "8123"]
    assert main(["serve", *arguments]) == 0
    assert made["name"] == target and (made["host"], made["port"]) == ("localhost", 8123)
    assert attachment_of(made["model"]).drafter.dtype == torch.float32
    assert "http://localhost:8123/v1" in capsys.readouterr().out


@pytest.fixture(scope="module")
def served():
    """Transformers' server with a tiny target and its drafter, and a client."""
    openai = pytest.importorskip("openai", reason="needs openai (pip install 'coral-hf[serve]')")
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason=f"needs {module} (pip install 'coral-hf[serve]')")
    target, tokenizer = make_target(dtype=torch.float32), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    plain = make_target(dtype=torch.float32).generate  # of the same weights, with no drafter
    drafter = make_drafter(target)
    attach(target, drafter)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = openai_server(target, tokenizer, NAME)(host="127.0.0.1", port=port, non_blocking=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
    wait_until_started(server)

    def expected(text, **settings):
        ids = tokenizer(text, return_tensors="pt").input_ids
        settings = {"do_sample": False, "max_new_tokens": 16, "tokenizer": tokenizer, **settings}
        new = plain(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    yield SimpleNamespace(client=client, expected=expected, drafter=drafter, tokenizer=tokenizer)
    server.kill_server()


def wait_until_started(server):
    for _ in range(600):
        if server.server.started:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the server did not start within a minute")


def chat(served, **settings):
    settings = {"temperature": 0.0, "max_tokens": 16, **settings}
    return served.client.chat.completions.create(model=NAME, messages=MESSAGES, **settings)


def text_of(stream):
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def test_chat(served):
    expected = served.expected("w3 w4 w5 ")
    served.drafter.last_stats = None
    assert chat(served).choices[0].message.content == expected
    assert served.drafter.last_stats.steps > 0
    assert text_of(chat(served, stream=True)) == expected


def test_completions(served):
    settings = {"model": NAME, "prompt": "w3 w4 w5", "temperature": 0.0, "max_tokens": 16}
    expected = served.expected("w3 w4 w5")
    assert served.client.completions.create(**settings).choices[0].text == expected
    parts = served.client.completions.create(**settings, stream=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected


def test_stop_strings(served):
    whole = served.expected("w3 w4 w5")
    stop = whole[len(whole) // 2 :][:3]
    answer = served.client.completions.create(
        model=NAME, prompt="w3 w4 w5", temperature=0.0, max_tokens=16, stop=[stop]
    )
    assert answer.choices[0].text == served.expected("w3 w4 w5", stop_strings=[stop])


def test_sampled_answers_are_those_of_plain_generate(served):
    """The same seed, the same tokens: the server seeds torch, and drafting draws as plain `generate` does."""
    settings = {"do_sample": True, "max_new_tokens": 16, "temperature": 1.5}
    extra = {"generation_config": json.dumps(settings)}
    found = [chat(served, temperature=1.5, seed=seed, extra_body=extra).choices[0].message.content for seed in (7, 8)]
    expected = []
    for seed in (7, 8):
        torch.manual_seed(seed)
        expected.append(served.expected("w3 w4 w5 ", **settings))
    assert found == expected and found[0] != found[1]


def test_two_clients_at_once(served):
    expected, found = served.expected("w3 w4 w5 "), []

    def ask():
        found.append(text_of(chat(served, stream=True)))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected, expected]


def test_a_client_that_leaves_does_not_stop_the_others(served):
    stream = chat(served, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    assert chat(served).choices[0].message.content == served.expected("w3 w4 w5 ")


def test_a_server_with_another_manager_is_named(monkeypatch):
    manager = pytest.importorskip("transformers.cli.serving.model_manager", reason="Transformers' server is missing")
    monkeypatch.setattr(manager, "ModelManager", object)
    with pytest.raises(ValueError, match=r"ModelManager\._load_model"):
        compat.openai_server(None, None, NAME)
