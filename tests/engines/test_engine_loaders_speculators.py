"""speculators' own classes load the exported drafter and draft the same tokens: skipped unless it is installed.

`CUDA_VISIBLE_DEVICES= python -m pytest tests/engines/test_engine_loaders*.py`. Versions and results of the last run:
`benchmarks/records/engine_loaders.json`.
"""

import pytest
import torch
from helpers.engine_drafters import DRAFTERS, assert_same_step, eight_layer_target, make, one_step, shipped_pair
from safetensors.torch import load_file

from coral_hf.conversion import export_drafter


speculators = pytest.importorskip("speculators", reason="speculators is not installed")

NAMES = [name for name, (_, engines) in DRAFTERS.items() if "speculators" in engines]


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


@pytest.mark.parametrize("name", NAMES)
def test_speculators_loads_and_drafts(name, target, tmp_path):
    """Its config and every weight, the target's embedding and head, and one step of its own forward."""
    load_and_draft(make(name, target), target, tmp_path)


@pytest.mark.real_model
def test_speculators_loads_and_drafts_with_the_shipped_drafter(tmp_path):
    load_and_draft(*shipped_pair(), tmp_path, tolerance=1e-4)


@torch.no_grad()
def load_and_draft(drafter, target, tmp_path, tolerance=1e-5):
    target.save_pretrained(tmp_path / "target")
    export_drafter(drafter, "speculators", tmp_path / "out", target_name=str(tmp_path / "target"))
    model = speculators.SpeculatorModel.from_pretrained(tmp_path / "out").float().eval()
    assert type(model.config).__name__ == "Eagle3SpeculatorConfig"
    assert model.target_layer_ids == drafter.config.target_feature_layers
    proposal = model.config.speculators_config.proposal_methods[0]
    assert proposal.speculative_tokens == drafter.config.draft_depth
    state = model.state_dict()
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(state[key], tensor), key
    # NaN marks the target's weights, but 0.9.0 loses the mark if transformers builds the model on the meta device
    model.embed_tokens.weight.fill_(torch.nan)
    if drafter.draft_head is None:
        model.lm_head.weight.fill_(torch.nan)
    model.load_verifier_weights()
    assert torch.equal(model.embed_tokens.weight, target.get_input_embeddings().weight)

    seen = {}
    model.norm.register_forward_hook(lambda _, args, output: seen.update(before=args[0][0], after=output[0]))
    model.lm_head.register_forward_hook(lambda _, args, output: seen.update(logits=output[0]))
    ids, features, expected = one_step(drafter, target)
    documents = torch.zeros(1, len(ids), dtype=torch.long)
    model(hidden_states=features[None], input_ids=ids[None], document_ids=documents, ttt_steps=1)
    fed_back = seen["after"] if drafter.config.norm_output else seen["before"]
    assert_same_step(drafter, seen["after"], fed_back, expected, tolerance)
    head = target.get_output_embeddings() if drafter.draft_head is None else drafter.draft_head
    torch.testing.assert_close(seen["logits"], expected @ head.weight.T, rtol=tolerance, atol=tolerance)
