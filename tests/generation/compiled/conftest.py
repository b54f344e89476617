"""Compiled calls without a compiler."""

import pytest

from coral_hf.generation.compiled import graphed_generator, static_forward


@pytest.fixture
def untraced(monkeypatch):
    """Runs the functions uncompiled, for tests of their results."""
    for module in (graphed_generator, static_forward):
        monkeypatch.setattr(module, "compiled", lambda function, options: function)
