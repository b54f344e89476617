"""Drafters of the Hub by their published configs, loaded by `from_eagle` on the meta device: sizes, no weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from coral_hf import CoralDraftModel
from coral_hf.conversion import eagle_import
from coral_hf.conversion.engine_export import meta_target
from coral_hf.conversion.schema import layout_shapes
from coral_hf.drafter.draft_layer import DraftKeyValues


DOCS = Path(__file__).parents[2] / "docs"
FACTS = json.loads((DOCS / "hub_drafters.json").read_text())
IDS = [drafter["id"] for drafter in FACTS["drafters"]]


def target_of(drafter):
    return meta_target(AutoConfig.for_model(**FACTS["targets"][drafter["target"]]))


def published_tensors(config):
    """Tensors as the method's code saves them for a config: real ones where `from_eagle` reads values."""
    layer = config.get("transformer_layer_config", config)
    rows, hidden, vocab = config.get("draft_vocab_size"), layer["hidden_size"], layer["vocab_size"]
    heads = layer["num_attention_heads"]
    queries = heads * layer.get("head_dim", hidden // heads)
    keys = queries // heads * layer.get("num_key_value_heads", heads)
    inner, attention_input = layer["intermediate_size"], hidden * (2 if rows else 1)
    shapes = {
        "self_attn.q_proj.weight": (queries, attention_input),
        "self_attn.k_proj.weight": (keys, attention_input),
        "self_attn.v_proj.weight": (keys, attention_input),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "post_attention_layernorm.weight": (hidden,),
    }
    if rows:
        shapes |= {"input_layernorm.weight": (hidden,), "hidden_norm.weight": (hidden,)}
    prefix = "midlayer" if rows else "layers.0"
    shapes = {f"{prefix}.{name}": shape for name, shape in shapes.items()}
    shapes["fc.weight"] = (hidden, hidden * (3 if rows else 2))
    if rows:
        shapes |= {"norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}
    elif config.get("bias", True):  # EAGLE's code takes a missing key for a bias
        shapes["fc.bias"] = (hidden,)
    tensors = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    if rows:
        ids = torch.arange(rows) * (vocab // rows)
        tensors |= {"d2t": ids - torch.arange(rows), "t2d": torch.zeros(vocab).bool().index_fill_(0, ids, True)}
    return tensors


def load(drafter, monkeypatch, tmp_path):
    """`from_eagle` of a published config, its weights and the drafter on the meta device."""

    def on_meta(config):
        with torch.device("meta"):
            return CoralDraftModel(config)

    (tmp_path / "config.json").write_text(json.dumps(drafter["config"]))
    monkeypatch.setattr(eagle_import, "read_tensors", lambda folder: published_tensors(drafter["config"]))
    return eagle_import.load_eagle(on_meta, tmp_path, target_of(drafter))


@pytest.mark.filterwarnings("ignore:for draft_head.token_ids")  # its values do not fit on the meta device
@pytest.mark.parametrize("drafter", FACTS["drafters"], ids=IDS)
def test_loads_from_its_published_config(drafter, monkeypatch, tmp_path):
    loaded = load(drafter, monkeypatch, tmp_path)
    config = loaded.config
    required, _ = layout_shapes(config)
    assert {name: tuple(loaded.state_dict()[name].shape) for name in required} == required
    assert config.target_num_hidden_layers == FACTS["targets"][drafter["target"]]["num_hidden_layers"]
    assert config.shape == ("eagle3" if "draft_vocab_size" in drafter["config"] else "eagle")
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    if "stated_parameters" in drafter:  # by the method's authors
        assert f"{parameters / 1e9:.2f}B" == drafter["stated_parameters"]
    draft_once(loaded)


def draft_once(drafter):
    config = drafter.config
    embeds = torch.empty(1, 4, config.hidden_size, dtype=drafter.dtype, device="meta")
    features = embeds.repeat(1, 1, config.num_target_features)  # [1, 4, n * H]
    cache = DraftKeyValues(config, 8, drafter.dtype, "meta")
    positions = torch.arange(4, device="meta")[None]
    hidden, fed_back = drafter.draft(embeds, drafter.project_features(features), positions, cache, 0)
    assert hidden.shape == fed_back.shape == embeds.shape


@pytest.mark.parametrize("drafter", FACTS["refused"], ids=[drafter["id"] for drafter in FACTS["refused"]])
def test_refusals_are_those_of_the_page(drafter, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=drafter["refusal"]):
        load(drafter, monkeypatch, tmp_path)


def test_the_page_is_made_from_the_facts(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "build_hub_drafters", raising=False)
    import build_hub_drafters

    assert (DOCS / "hub_drafters.md").read_text() == build_hub_drafters.page(), "run python docs/build_hub_drafters.py"
    every = [entry["id"] for part in ("drafters", "refused", "named") for entry in FACTS[part]]
    assert len(set(every)) == len(every) and len(IDS) >= 12
