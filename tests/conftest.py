"""Shared by all tests: settings, a tiny target, a Hub on the loopback address, a folder like a README reader's."""

import os

from helpers.tiny_models import make_drafter, make_target, make_tokenizer


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import logging

import huggingface_hub
import pytest
import torch
from helpers.deprecations import OurDeprecations
from helpers.hub_server import serve
from helpers.tiny_trainings import random_rows
from huggingface_hub import constants
from transformers.utils.logging import warning_once

import coral_hf  # noqa: F401  (registers the Auto classes and the generate hook)
from coral_hf import demo


# Helpers with assertions of their own show values as tests do.
pytest.register_assert_rewrite("helpers.drafted_calls", "helpers.engine_drafters", "helpers.parity")


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads(request):
    """Gives each test the threads its module names as THREADS, 1 by default, whatever an earlier test set.

    Tiny models are faster on one thread. Several threads may add up in another order from run to run.
    """
    torch.set_num_threads(getattr(request.module, "THREADS", 1))


@pytest.fixture(autouse=True)
def our_deprecations():
    """Fails a test in which our code makes Transformers log a deprecation."""
    warning_once.cache_clear()  # each message is logged once in a process: not in an earlier test alone
    handler, logger = OurDeprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    assert not handler.messages, "\n".join(handler.messages)


@pytest.fixture
def transformers_log():
    """The messages Transformers logs, each as often as it is logged.

    `caplog` would count a message twice in a process in which something has let that logger propagate.
    """
    messages: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def exact_norms(monkeypatch):
    """RMSNorm in its input's dtype: Llama's uses float32, whose rounding hides small errors in float64 tests."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self, hidden_states):
        return self.weight * torch.nn.functional.rms_norm(
            hidden_states, hidden_states.shape[-1:], eps=self.variance_epsilon
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory):
    """`evaluate` copies the modules it loads: here into one folder for all tests, since Python imports them once."""
    evaluate = pytest.importorskip("evaluate", reason="the metrics need evaluate (pip install 'coral-hf[eval]')")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def target():
    return make_target()


@pytest.fixture
def prompt():
    return torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, and a client that connects to it only."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # LFS over plain HTTP: Xet is a protocol of its own
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between attempts
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder where the README's placeholders exist: a tiny `your/model`, prompts and responses; `demo` is tiny too."""
    target, tokenizer = make_target(dtype=torch.float32), make_tokenizer()
    for name in ("your/model", "a/small-model"):
        target.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name in ("tiny", "your/drafter"):
        make_drafter(target).save_pretrained(tmp_path / name)
    monkeypatch.setattr(demo, "load_target", lambda dtype=None, *_: (target, tokenizer))
    monkeypatch.setattr(demo, "drafter_path", lambda: tmp_path / "tiny")
    prompts = [{"id": f"p{i}", "turns": [f"w{i} w{i + 1}"]} for i in range(5)]
    for name, part in (("prompts.jsonl", prompts[:3]), ("eval_prompts.jsonl", prompts[3:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    rows = [{"turn": 0, **row} for row in random_rows(8)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path
