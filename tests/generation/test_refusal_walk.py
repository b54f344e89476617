"""Triggers every refusal of a call and follows its message: the advice works and never leads back to a refusal."""

import ast
from pathlib import Path

import pytest
from helpers.refusals import (  # noqa: F401  (register cases)
    REFUSALS,
    of_batches,
    of_caches,
    of_calls,
    of_recurrent_layers,
    of_the_hook,
    of_the_target,
)

import coral_hf


pytestmark = pytest.mark.slow

PACKAGE = Path(coral_hf.__file__).parent
FILES = (
    "generation/call_checks.py",
    "generation/key_values/dynamic.py",
    "generation/key_values/recurrent_layers.py",
    "generation/hook.py",
    "generation/drafter_checks.py",
    "drafter/target_adapter.py",
)


def raises_of(name: str) -> dict[int, str]:
    """The `raise` statements of a file with a message, by line: their literal words, a value between two as `{}`."""
    found = {}
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            message = node.exc.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            found[node.lineno] = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_refusal_has_a_case(name):
    words = [words for words, _ in REFUSALS.values()]
    missing = {line: text for line, text in raises_of(name).items() if not any(part in text for part in words)}
    assert not missing, f"write a case in tests/helpers/refusals for these refusals of {name}: {missing}"


def test_every_case_is_of_one_refusal():
    texts = [text for name in FILES for text in raises_of(name).values()]
    assert {words: sum(words in text for text in texts) for words, _ in REFUSALS.values()} == {
        words: 1 for words, _ in REFUSALS.values()
    }


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min")
@pytest.mark.parametrize("case", list(REFUSALS))
def test_following_a_refusal_leads_to_success(case, monkeypatch, tmp_path):
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path))
    words, build = REFUSALS[case]
    refused, remedies = build(monkeypatch)
    with pytest.raises((ValueError, RuntimeError, OSError)) as caught:
        refused()
    message = str(caught.value)
    assert words in message and remedies
    for remedy, call in remedies.items():
        assert remedy in message, f"{remedy!r} is not what this says: {message}"
        call()
