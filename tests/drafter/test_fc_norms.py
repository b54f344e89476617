"""Norms before `fc`: the first weights, training and drafting of a drafter over several normed features."""

import pytest
import torch
from helpers.parity import TREES, compare
from helpers.rollout_reference import build, random_inputs, reference_projection
from helpers.tiny_models import make_drafter, make_target, randomize
from helpers.tiny_trainings import assert_same_weights, logged, make_trainer, quick_drafter, random_rows, weights

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.generation.costs.measurement import costs_key
from coral_hf.generation.settings import DraftSettings
from coral_hf.utils.compat import enable_checkpointing


LAYERS = [1, 2, -1]
KINDS = ["norm_before_fc", "fc_norm"]
NAMES = {
    "norm_before_fc": {"input_norm.weight": (96,)},
    "fc_norm": {f"fc_norm.{index}.weight": (32,) for index in range(3)},
}


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_named_as_in_the_engines_and_start_as_ones(kind, target):
    plain = make_drafter(target, target_feature_layers=LAYERS)
    drafter = make_drafter(target, target_feature_layers=LAYERS, **{kind: True})
    added = {name: value for name, value in drafter.state_dict().items() if name not in plain.state_dict()}
    assert {name: tuple(value.shape) for name, value in added.items()} == NAMES[kind]
    assert all(torch.equal(value, torch.ones_like(value)) for value in added.values())


@pytest.mark.parametrize("layers", [LAYERS, [3, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_fc_starts_as_the_last_feature_and_a_share_of_the_others(kind, layers, target):
    """As without a norm, but with size one for any sizes of the layers."""
    drafter = make_drafter(target, target_feature_layers=layers, **{kind: True})
    features = TargetAdapter(target, layers).compute_features(torch.arange(3, 120)[None])
    seen = []
    with torch.no_grad(), drafter.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        drafter.project_features(features)
    parts = seen[0][0].unflatten(-1, (len(layers), 32))  # [S, n, H]
    blocks = drafter.fc.weight.unflatten(1, (len(layers), 32))  # [H, n, H]
    diagonal = blocks[:, -1].diagonal()
    assert torch.equal(blocks[:, -1], torch.diag(diagonal)) and (diagonal == diagonal[0]).all()
    sizes = [
        (parts[:, index] @ blocks[:, index].T).square().mean(-1).sqrt().median().item() for index in range(len(layers))
    ]
    assert 0.7 < sizes[-1] < 1.4
    assert all(0.12 < size / sizes[-1] < 0.5 for size in sizes[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_normed_before_fc(kind, exact_norms):
    """In the order of the layers, and independent of the size of all features, or of each."""
    variant = "eagle3-norm-before-fc" if kind == "norm_before_fc" else "eagle3-fc-norms"
    drafter = build(variant)
    count = drafter.config.num_target_features
    _, features = random_inputs(drafter, 1, 6)
    with torch.no_grad():
        found = drafter.project_features(features)
        torch.testing.assert_close(found[0], reference_projection(drafter, features[0]), rtol=0, atol=1e-12)
        unlike = torch.arange(1, count + 1, dtype=features.dtype).repeat_interleave(32)
        for factor, same in ((100.0, True), (100 * unlike, kind == "fc_norm")):
            scaled = drafter.project_features(factor * features)
            assert torch.allclose(scaled, found, rtol=1e-3, atol=1e-4) == same


@pytest.mark.parametrize("preset", ["eagle", "hass"])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, preset, target, tmp_path):
    drafter = quick_drafter(target, target_feature_layers=LAYERS, **{kind: True})
    rows = random_rows(16)
    trainer = make_trainer(tmp_path, target, drafter, rows, eval_dataset=rows, preset=preset)
    before, loss = weights(drafter), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * loss
    assert logged(trainer, "classification_1")[-1] < logged(trainer, "classification_1")[0]
    assert all(not torch.equal(value, before[name]) for name, value in weights(drafter).items()), "all take part"
    trainer.save_model()
    assert_same_weights(weights(CoralDraftModel.from_pretrained(tmp_path)), weights(drafter), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_of_the_features_as_the_target_gives_them(kind, target, tmp_path):
    drafter = quick_drafter(target, target_feature_layers=LAYERS, **{kind: True})
    norm = drafter.input_norm if kind == "norm_before_fc" else drafter.fc_norm[0]
    plain, noisy = (
        make_trainer(tmp_path, target, drafter, preset="eagle", feature_noise=noise) for noise in (0.0, 0.5)
    )
    read = []
    drafter.train()
    with norm.register_forward_pre_hook(lambda _, args: read.append(args[0].detach())):
        for trainer in (plain, noisy):
            trainer.rollout(drafter, trainer.data_collator([trainer.train_dataset[0]]), 1)
    batch = plain.data_collator([plain.train_dataset[0]])
    exact = TargetAdapter(target, LAYERS).compute_features(batch["input_ids"])[:, :-1, : read[0].shape[-1]]
    torch.testing.assert_close(read[0], exact, rtol=0, atol=1e-5)
    assert not torch.allclose(read[1], exact, atol=1e-2)


@pytest.mark.parametrize("variant", ["eagle3-norm-before-fc", "eagle3-fc-norms"])
def test_activation_checkpointing_changes_no_gradient(variant):
    drafter = build(variant).train()
    embeds, features = random_inputs(drafter, 2, 8)

    def gradients():
        drafter.zero_grad()
        sum(hidden.square().sum() for hidden in drafter(embeds, features, num_steps=3).hidden_states).backward()
        return {name: value.grad.clone() for name, value in drafter.named_parameters()}

    expected = gradients()
    enable_checkpointing(drafter)
    assert_same_weights(gradients(), expected, rtol=0, atol=1e-12)
    assert all(value.abs().sum() > 0 for value in expected.values())


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", ["chain", "tree8"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_the_target(kind, tree, settings):
    target = make_target()
    drafter = randomize(make_drafter(target, target_feature_layers=LAYERS, **{kind: True}), scale=0.1)
    _, stats = compare(target, drafter, torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]]), TREES[tree], **settings)
    assert stats.acceptance_length > 1.5


def test_costs_are_measured_for_each(target):
    """Stored costs of drafters without a norm keep their key."""
    kinds = [{}, *({kind: True} for kind in KINDS)]
    drafters = [make_drafter(target, target_feature_layers=LAYERS, **settings) for settings in kinds]
    keys = [costs_key(target, drafter, DraftSettings())["drafter"] for drafter in drafters]
    assert keys[1:] == [{**keys[0], kind: True} for kind in KINDS] and not set(KINDS) & set(keys[0])
