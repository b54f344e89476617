"""200 random batches of `fuzz_batches.py`: no difference from plain `generate`, and drafts were accepted."""

import fuzz_batches
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 200, 50))
def test_random_batches(start):
    total = fuzz_batches.run(seed=1, start=start, count=50)
    assert total["faults"] == 0  # each was printed with the command that shows it alone
    assert total["random_accepted"] > 0
    # 0.7 a step in all 200; the drafters, costs and probabilities drawn for 50 of them give from 0.3 to 1.1
    assert total["oracle_accepted"] > total["oracle_steps"] * 0.25
