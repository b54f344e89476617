"""The fuzz scripts silence Transformers; the previous verbosity is restored for later tests."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def loudness():
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
