"""Compiled calls without a compiler."""

import pytest

from coral_hf.generation.compiled import graphed_generator, static_forward


@pytest.fixture
def untraced(monkeypatch):
    """What would be compiled runs as it is: for tests of what it computes."""
    for module in (graphed_generator, static_forward):
        monkeypatch.setattr(module, "compiled", lambda function, options: function)
