"""Training against targets with recurrent layers: features of any kind of layer, no packing, exact in padded batches."""

import pytest
import torch
from helpers.recurrent_targets import STATES, make_hybrid
from helpers.tiny_trainings import make_trainer, quick_drafter, random_rows, weights

from coral_hf.drafter.target_adapter import TargetAdapter


families = pytest.mark.parametrize(
    "family", [name if name == "qwen3_5_text" else pytest.param(name, marks=pytest.mark.slow) for name in STATES]
)


@families
def test_a_training_moves_the_drafter_alone(family, tmp_path):
    """With the features of a recurrent layer, an attention layer and the last one."""
    target = make_hybrid(family, torch.float32, "sdpa")
    drafter = quick_drafter(target, target_feature_layers=[1, 2, -1])
    before, own = weights(drafter), weights(target)
    trainer = make_trainer(tmp_path, target, drafter, random_rows(8), max_steps=3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(loss == loss and loss > 0 for loss in losses)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(drafter).items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights(target).items())


@families
def test_padding_changes_no_features(family):
    """Rows of a batch are padded on the right, which no layer sees."""
    target = make_hybrid(family)
    adapter = TargetAdapter(target, [1, 2, -1])
    texts = [torch.tensor([row["prompt_ids"] + row["response_ids"]]) for row in random_rows(3)]
    longest = max(text.shape[1] for text in texts)
    ids = torch.cat([torch.nn.functional.pad(text, (0, longest - text.shape[1])) for text in texts])
    mask = torch.cat([torch.arange(longest)[None] < text.shape[1] for text in texts]).long()
    padded = adapter.compute_features(ids, attention_mask=mask)
    for row, text in enumerate(texts):
        alone = adapter.compute_features(text)
        torch.testing.assert_close(padded[row : row + 1, : text.shape[1]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_packing_is_refused(family, tmp_path):
    """A state would run from one conversation of a row into the next. Without packing the same training runs."""
    target = make_hybrid(family, torch.float32, "sdpa")
    with pytest.raises(ValueError, match="run across the conversations of a row; train without packing"):
        make_trainer(tmp_path, target, packing=True)
    make_trainer(tmp_path, target, packing=False, max_steps=1).train()
