"""Hints, help, docs, recipes and code name no training argument that Transformers deprecates."""

import ast
import re
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments

from coral_hf import cli
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.router_trainer import CoralRouterTrainer
from coral_hf.training.trainer import CoralTrainer
from coral_hf.utils.compat import checkpointing_argument


ROOT = Path(__file__).parents[1]
ROOMS = ("coral_hf", "docs", "examples", "benchmarks", "scripts", "model_cards", "tests")
ARGUMENTS = {entry.name: entry.metadata.get("help", "") for entry in fields(TrainingArguments)}
DEPRECATED = {name for name, text in ARGUMENTS.items() if text.startswith("Deprecated")}


def written(*kinds: str) -> dict[str, str]:
    """All our texts, by path, and the command line's hint when memory runs out."""
    paths = [path for room in ROOMS for kind in kinds for path in (ROOT / room).rglob(f"*{kind}")]
    paths += [path for kind in kinds for path in ROOT.glob(f"*{kind}")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def named_flags() -> dict[tuple[str, str | None], str]:
    """Flags of `TrainingArguments` with the values shown with them -> their places."""
    found = {}
    texts = written(".py", ".md", ".sh")
    texts.pop(str(Path(__file__).relative_to(ROOT)), None)
    hints = {
        f"cli, hint of {verb}": hint.format(checkpointing=checkpointing_argument())
        for verb, hint in cli._SMALLER.items()
    }
    for place, text in {**texts, **hints}.items():
        for name, value in re.findall(r"--([a-z][\w-]*)(?:[ =]([^\s`'\"\\)(,;|$-][^\s`'\"\\),;]*))?", text):
            name = name.replace("-", "_")
            if name in ARGUMENTS:
                found.setdefault((name, value or None), place)
    return found


def test_no_named_flag_is_deprecated():
    flags = named_flags()
    names = {name for name, _ in flags}
    assert {"save_total_limit", "per_device_train_batch_size", checkpointing_argument()} <= names
    assert not {name: place for (name, _), place in flags.items() if name in DEPRECATED}


def test_no_keyword_of_ours_is_deprecated():
    """Also in tests, as a keyword or as a key of settings."""
    found = []
    for place, text in written(".py").items():
        for node in ast.walk(ast.parse(text)):
            names = [node.arg] if isinstance(node, ast.keyword) else []
            if isinstance(node, ast.Dict):
                names = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            found += [f"{place}:{node.lineno}: {name}" for name in names if name in DEPRECATED]
    assert not found


def test_no_named_value_is_deprecated(tmp_path, transformers_log):
    """Values can be deprecated too (`fsdp` as a text): every flag is parsed with the values shown with it."""
    parser, parsed, wrong = HfArgumentParser([CoralTrainingArguments]), 0, {}
    for (name, value), place in named_flags().items():
        if name in ("output_dir", "use_cpu"):
            continue
        words = [f"--{name}"] + ([] if value is None else [value])
        transformers_log.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *words])
            except (SystemExit, ValueError, ImportError):
                continue  # a placeholder, or what needs another flag beside it
        parsed += 1
        said = [*transformers_log, *(str(warning.message) for warning in caught)]
        if texts := [text for text in said if "deprecated" in text.lower()]:
            wrong[place] = words, texts
    assert parsed > 15 and not wrong


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this Transformers release does not ask")
@pytest.mark.parametrize("trainer", [CoralTrainer, CoralRouterTrainer])
def test_the_trainers_say_that_their_loss_is_scaled(trainer):
    """Transformers requires it of subclasses with their own `compute_loss`, instead of guessing from the model."""
    assert trainer.loss_is_scaled_for_ga is True
