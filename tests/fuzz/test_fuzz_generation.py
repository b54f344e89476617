"""150 random calls of `fuzz_generation.py`: no difference from plain `generate`, and drafts were accepted."""

import fuzz_generation
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 150, 50))
def test_random_settings(start):
    total = fuzz_generation.run(seed=1, start=start, count=50)
    assert total["faults"] == 0  # each was printed with the command that shows it alone
    assert total["refused"] < 5
    assert total["random_accepted"] > 0
    assert total["oracle_accepted"] > total["oracle_steps"] * 0.4
