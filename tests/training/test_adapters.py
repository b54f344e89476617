"""PEFT: a drafter adapted to a fine-tuned target, targets that are PEFT models, merging and saving."""

import pytest
import torch
from helpers.tiny_models import make_target
from helpers.tiny_trainings import assert_same_weights, make_args, make_trainer, quick_drafter, random_rows, weights
from transformers import AutoModel

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.training.feature_cache import FeatureCache
from coral_hf.training.router_trainer import CoralRouterTrainer
from coral_hf.training.trainer import CoralTrainer


peft = pytest.importorskip("peft")
PROMPT = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])


def adapted_trainer(folder, target, drafter, config=None, **settings) -> CoralTrainer:
    return CoralTrainer(
        model=drafter,
        target_model=target,
        args=make_args(folder, rollout_schedule="3", num_train_epochs=8, learning_rate=3e-2, **settings),
        train_dataset=random_rows(16),
        eval_dataset=random_rows(4, seed=3),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8) if config is None else config,
    )


def peft_target(seed: int = 0):
    """A target with LoRA adapters that have an effect."""
    base = make_target(dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).eval()


def test_the_seed_decides_new_adapters(tmp_path):
    target = make_target(dtype=torch.float32)
    drawn = []
    for seed in (7, 7, 8):
        torch.rand(3)  # whatever was drawn before
        drawn.append(weights(adapted_trainer(tmp_path, target, quick_drafter(target), seed=seed).model))
    assert_same_weights(drawn[0], drawn[1], rtol=0, atol=0)
    assert any(not torch.equal(value, drawn[2][name]) for name, value in drawn[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
def test_an_adapted_drafter_is_merged_and_drafts(shape, tmp_path):
    drafter = quick_drafter(make_target(dtype=torch.float32), shape)
    tuned = make_target(dtype=torch.float32, seed=4)
    tuned.config._name_or_path = "org/tuned"
    before = weights(drafter)
    trainer = adapted_trainer(tmp_path, tuned, drafter)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    adapted = trainer.evaluate()["eval_loss"]
    assert adapted < 0.95 * start
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    trainer.save_model()
    assert any("lora_" in name for name, _ in trainer.model.named_parameters()), "training can continue"
    merged = AutoModel.from_pretrained(tmp_path)
    assert isinstance(merged, CoralDraftModel) and set(merged.state_dict()) == set(before)
    moved = {name for name, value in before.items() if not torch.equal(value, merged.state_dict()[name])}
    assert "layers.0.self_attn.q_proj.weight" in moved and "layers.0.post_attention_layernorm.weight" not in moved
    assert merged.config.target_name_or_path == "org/tuned"
    again = make_trainer(tmp_path, tuned, merged, eval_dataset=random_rows(4, seed=3))
    assert again.evaluate()["eval_loss"] == pytest.approx(adapted, rel=1e-4)
    # the adapters themselves, on the drafter they were made for
    drafter = quick_drafter(make_target(dtype=torch.float32), shape)
    loaded = peft.PeftModel.from_pretrained(drafter, tmp_path / "adapter").merge_and_unload()
    assert_same_weights(weights(merged), weights(loaded), rtol=1e-5, atol=1e-6)
    expected = tuned.generate(PROMPT, max_new_tokens=20, do_sample=False)
    assert torch.equal(tuned.generate(PROMPT, assistant_model=merged, max_new_tokens=20, do_sample=False), expected)
    assert merged.last_stats is not None


def test_adapters_resume_exactly(tmp_path):
    target = make_target(dtype=torch.float32, seed=4)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    runs = []
    for resume in (None, tmp_path / "checkpoint-3"):
        trainer = adapted_trainer(tmp_path, target, quick_drafter(make_target(dtype=torch.float32)), **settings)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(weights(trainer.model))
    assert_same_weights(*runs, rtol=0, atol=0)
    plain = make_trainer(tmp_path, target, **settings)
    with pytest.raises(ValueError, match=r"contains no model.safetensors, which this training needs"):
        plain.train(resume_from_checkpoint=True)


def test_a_target_under_peft_is_the_merged_target(tmp_path):
    target = peft_target()
    results = []
    for model in (target, peft_target().merge_and_unload()):
        drafter = quick_drafter(model)
        trainer = make_trainer(tmp_path, model, drafter, num_train_epochs=1, preset="hass", optim="sgd")
        before = weights(model)
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        results.append(weights(drafter))
    assert_same_weights(*results, rtol=1e-3, atol=1e-4)
    trainer.save_model()
    saved = CoralDraftModel.from_pretrained(tmp_path)
    expected = target.generate(input_ids=PROMPT, max_new_tokens=16, do_sample=False)
    found = target.generate(input_ids=PROMPT, assistant_model=saved, max_new_tokens=16, do_sample=False)
    assert torch.equal(found, expected)


def test_a_cache_tells_adapters_of_one_base_apart(tmp_path):
    FeatureCache(tmp_path, TargetAdapter(peft_target()), "name")
    FeatureCache(tmp_path, TargetAdapter(peft_target()), "name")
    with pytest.raises(ValueError, match="contains features of"):
        FeatureCache(tmp_path, TargetAdapter(peft_target(seed=1)), "name")


def test_settings_that_make_no_sense_are_refused(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = peft.get_peft_model(quick_drafter(target), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already"):
        adapted_trainer(tmp_path, target, drafter)
    routed = quick_drafter(target, router_groups=8)
    with pytest.raises(ValueError, match="leave peft_config out"):
        CoralRouterTrainer(routed, target, make_args(tmp_path, stage="router"), peft_config=peft.LoraConfig())
