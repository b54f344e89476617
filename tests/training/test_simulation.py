"""Simulated chains, against counts by hand and against `generate`."""

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import make_trainer, quick_drafter, random_rows

from coral_hf import coral_generate
from coral_hf.training.report.simulation import ChainStatistics


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
def test_simulated_tau_is_what_generate_reaches(shape, depth, tmp_path):
    target = make_target()
    drafter = quick_drafter(target, shape)
    prompts = [row["prompt_ids"] for row in random_rows(5, seed=3)]
    rows = []
    for prompt in prompts:
        ids = target.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        rows.append({"prompt_ids": prompt, "response_ids": ids[0, len(prompt) :].tolist()})
    trainer = make_trainer(
        tmp_path, target, drafter, rows, eval_dataset=rows, eval_chain_depth=depth, num_train_epochs=8, preset="hass"
    )
    trainer.train()  # so that chains of several lengths occur
    metrics = trainer.evaluate()

    steps = accepted = 0
    drafter.eval()
    for prompt, row in zip(prompts, rows, strict=True):
        ids = coral_generate(
            target,
            drafter,
            input_ids=torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            draft_depth=depth,
            draft_top_k=1,
        )
        assert ids[0, len(prompt) :].tolist() == row["response_ids"]
        steps += drafter.last_stats.steps
        accepted += drafter.last_stats.n_accepted
    assert accepted > 10
    assert metrics["eval_acceptance_length"] == pytest.approx(1 + accepted / steps, abs=1e-12)
    assert f"eval_acceptance_{depth}" in metrics and f"eval_acceptance_{depth + 1}" not in metrics


def test_chain_statistics_by_hand():
    """One response of six tokens (rows 1..6); the first comes out of the prefill, chains of two draft the other five.

    Step 1 matches at rows 2, 3, 5, 6; step 2 at rows 3, 4 and 6. From row 2: drafts at rows 2 and 3 hold, bonus: 3
    tokens. From row 5: drafts at 5 and 6 hold, the response ends: 2 tokens. 5 tokens in 2 target forwards.
    """
    trained = torch.tensor([[False, True, True, True, True, True, True, False]])
    matches = torch.zeros(2, 1, 8, dtype=torch.bool)
    matches[0, 0, [2, 3, 5, 6]] = True
    matches[1, 0, [3, 4, 6]] = True
    statistics = ChainStatistics(2)
    statistics.add(matches, trained)
    assert statistics.tokens.tolist() == [5.0, 2.0]
    # rows 1..6 all start a chain; after a match at 2, 3 and 5 a second draft follows and is always right (row 6 has none)
    assert statistics.summary() == {"acceptance_1": 4 / 6, "acceptance_2": 1.0, "acceptance_length": 2.5}
    statistics.add(torch.zeros(2, 1, 8, dtype=torch.bool), trained)
    assert statistics.tokens.tolist() == [10.0, 7.0]


def test_chain_statistics_of_several_turns():
    """Chains do not run from one response into the next, and every response starts with a prefill."""
    trained = torch.tensor([[True, True, True, False, True, True]])
    statistics = ChainStatistics(3)
    statistics.add(torch.ones(3, 1, 6, dtype=torch.bool), trained)
    assert statistics.tokens.tolist() == [3.0, 2.0]
    short = ChainStatistics(5)
    short.add(torch.ones(5, 1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    assert short.tokens.tolist() == [1.0, 1.0]
