"""A drafter's folder for the tests of cards."""

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target


@pytest.fixture
def folder(tmp_path):
    """A tiny drafter's folder, with a place for records."""
    folder = tmp_path / "drafter"
    drafter = make_drafter(
        make_target(dtype=torch.float32), target_name_or_path="org/target", target_revision="0" * 40
    )
    drafter.save_pretrained(folder)
    (folder / "training").mkdir()
    return folder
