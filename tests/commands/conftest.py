"""A folder with a tiny target, its drafter and prompts."""

import json

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A tiny target with a tokenizer, its drafter and a prompt file."""
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    prompts = [{"id": f"p{i}", "turns": [f"w{i} w{i + 1} w{i + 2}"]} for i in range(3, 9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path
