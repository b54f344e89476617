"""200 random batches of `fuzz_batches.py`: no difference from plain `generate`, and drafts were accepted."""

import fuzz_batches
import pytest


@pytest.mark.slow
def test_random_batches():
    total = fuzz_batches.run(seed=1, start=0, count=200)
    assert total["faults"] == 0  # each was printed with the command that shows it alone
    assert total["random_accepted"] > 0
    assert total["oracle_accepted"] > total["oracle_steps"] * 0.4
