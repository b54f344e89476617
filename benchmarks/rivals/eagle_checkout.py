"""EAGLE's own code, from a checkout that the user names, with a CORAL drafter's weights.

The checkout is of https://github.com/SafeAILab/EAGLE (read at cb7e084, of February 2026). Nothing of it is in this repository.
It was written for Transformers 4. What this file changes when it imports it, so that it runs on Transformers 5:

- The modules of the Mixtral and Qwen targets are left out; they import what Transformers 5 removed. The target must be a Llama.
- Configs are handed over as Transformers 4 had them: `rope_theta` as an attribute, no `rope_scaling`.
- Tied weights are named by a dictionary.
- The target's and the drafter's weights come from the models in memory, not from files; no tokenizer is loaded.

And so that it can draft with drafters that EAGLE-3's first form cannot express: features of other layers are collected by
hooks, `fc` has their number, and a drafter with `norm_output=True` feeds back what the norm made. Neither adds an operation that
CORAL does not run, too. The record names these as `adapted`.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from coral_hf.conversion.eagle_config import default_feature_layers
from coral_hf.conversion.schema import LAYER, load_schemas
from coral_hf.drafter.configuration_coral import FC_NORMS
from coral_hf.drafter.target_adapter import TargetAdapter


_OTHER_TARGETS = {
    "modeling_mixtral_kv": "MixtralForCausalLM",
    "modeling_qwen2_kv": "Qwen2ForCausalLM",
    "modeling_qwen3_kv": "Qwen3ForCausalLM",
}
_SOURCES = ("ea_model", "cnets", "cnets1", "utils", "kv_cache", "modeling_llama_kv")
_SLACK = 32  # tokens: a step that ends an answer may accept more


class _OldConfig(LlamaConfig):
    """A Llama's config as Transformers 4 had it."""

    rope_scaling = None  # in Transformers 5 a property, which is never None


def load_checkout(checkout: str) -> Any:
    """The module `eagle.model.ea_model` of a checkout.

    Raises:
        ValueError: if the folder is not one.
    """
    folder = Path(checkout)
    if not (folder / "eagle" / "model" / "ea_model.py").is_file():
        raise ValueError(
            f"--checkout {checkout} contains no eagle/model/ea_model.py: give the folder of a checkout of "
            "https://github.com/SafeAILab/EAGLE."
        )
    sys.path.insert(0, str(folder))
    for name, model in _OTHER_TARGETS.items():
        left_out = ModuleType(f"eagle.model.{name}")
        setattr(left_out, model, None)
        sys.modules[left_out.__name__] = left_out
    ea_model = importlib.import_module("eagle.model.ea_model")
    ea_model.KVLlamaForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    ea_model.EConfig = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(**_read(path)))
    # an answer has a fixed length here: no token ends it
    tokenizer = SimpleNamespace(eos_token_id=None)
    ea_model.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    return ea_model


def checkout_hash(checkout: str) -> str:
    """SHA-256 of the checkout's files that run."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(checkout) / "eagle" / "model" / f"{name}.py").read_bytes())
    return digest.hexdigest()


def check_expressible(drafter: Any, target: Any) -> None:
    """Raises `ValueError` for a pair that EAGLE's code has no form for."""
    config, kind = drafter.config, target.config.model_type
    if kind != "llama":
        raise ValueError(
            f"EAGLE's code is run for Llama targets here, and this one is a {kind}: choose another --target."
        )
    problems = [f"{name}=True" for name in ("norm_before_residual", *FC_NORMS) if getattr(config, name)]
    for owner, settings in (("the drafter", config), ("the target", target.config)):
        if (rope := settings.rope_parameters["rope_type"]) != "default":
            problems.append(f"rope_type={rope!r} of {owner}")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim={config.head_dim} of {config.num_attention_heads} heads over {config.hidden_size}")
    if config.router_groups:
        problems.append(f"router_groups={config.router_groups}")
    if config.shape == "eagle" and config.shortlist_size:
        problems.append(f"shortlist_size={config.shortlist_size} with shape='eagle'")
    if config.shape == "eagle3" and config.attention_bias:
        problems.append("attention_bias=True with shape='eagle3'")
    if problems:
        raise ValueError(f"EAGLE's code cannot express this pair: {', '.join(problems)}.")


def adaptations(config: Any) -> list[str]:
    """What EAGLE's drafter is given beyond its own form for a drafter's config."""
    if config.shape == "eagle":
        return []
    layers = config.target_feature_layers
    found = (
        [] if layers == default_feature_layers(config.target_num_hidden_layers) else [f"features of layers {layers}"]
    )
    return [*found, *(["norm_output"] if config.norm_output else [])]


def drafter_weights(drafter: Any, target: Any) -> dict[str, torch.Tensor]:
    """The drafter's tensors, and those that it takes from its target, by EAGLE's names."""
    config, adapter = drafter.config, TargetAdapter(target)
    layer = load_schemas()["engines"]["eagle"][config.shape]["layer"]
    weights = {"embed_tokens.weight": adapter.embedding.weight}
    for name, tensor in drafter.state_dict().items():
        if not name.startswith(("shortlist.", "draft_head.")):
            weights[layer + name.removeprefix(LAYER) if name.startswith(f"{LAYER}.") else name] = tensor
    if config.shape == "eagle":
        return weights
    if config.norm_output:
        weights["fed_back_norm.weight"] = weights.pop("norm.weight")
    own, listed = drafter.draft_head, drafter.shortlist
    if own is None and listed is None:
        return {**weights, "lm_head.weight": adapter.head.weight}
    ids = (own or listed).token_ids.to(target.device)
    weights["lm_head.weight"] = adapter.head_rows(ids)[0] if own is None else own.weight
    if len(ids) < config.vocab_size:
        weights["d2t"] = ids - torch.arange(len(ids), device=ids.device)
    return weights


class EagleReference:
    """A copy of the target in EAGLE's code, with a drafter attached.

    Args:
        ea_model: what [`load_checkout`] returned.
        target (`PreTrainedModel`): its weights are shared, not copied.
        drafter ([`CoralDraftModel`])
        depth, top_k, total_tokens (`int`): as CORAL counts them, the root among the nodes.
        longest (`int`): tokens of the longest prompt and its answer.

    Raises:
        ValueError: if the code cannot express the pair, or a weight found no place.
    """

    def __init__(
        self, ea_model: Any, target: Any, drafter: Any, depth: int, top_k: int, total_tokens: int, longest: int
    ):
        check_expressible(drafter, target)
        self.ea_model, config = ea_model, drafter.config
        self.max_length = longest + total_tokens + _SLACK
        base = ea_model.Model if config.shape == "eagle3" else ea_model.Model1
        name = "Model" if config.shape == "eagle3" else "Model1"
        weights = drafter_weights(drafter, target)
        original = getattr(ea_model, name)
        setattr(ea_model, name, _drafter_class(base, config))
        try:
            with TemporaryDirectory() as scratch:
                path = Path(scratch) / "config.json"
                path.write_text(json.dumps(_drafter_config(config, weights)))
                # its depth counts the levels after the first
                sizes = total_tokens, depth - 1, top_k, 1.0
                copy = _target_copy(ea_model, target)
                self.model = ea_model.EaModel(config.shape == "eagle3", copy, "", str(path), *sizes, weights)
        finally:
            setattr(ea_model, name, original)
        self.model.eval()
        if config.shape == "eagle3":
            _collect_features(self.model.base_model.model, config.target_feature_layers)
        loaded = self.model.ea_layer.state_dict()
        astray = [key for key, value in weights.items() if key not in loaded or not torch.equal(loaded[key], value)]
        if astray:
            raise ValueError(
                f"EAGLE's drafter did not take {', '.join(astray)}: this file fits another version of it."
            )

    def answer(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], int]:
        """The greedy answer to ids `[1, L]` but its last token, which EAGLE keeps for the next step; and its verify steps."""
        # it ends when more than its limit is appended, the token of the prompt's forward aside
        output, _, last = self.model.eagenerate(
            ids, max_new_tokens=max_new_tokens - 2, max_length=self.max_length, log=True
        )
        return output[0, ids.shape[1] :].tolist()[: max_new_tokens - 1], last + 1


def _read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def _target_copy(ea_model: Any, target: Any) -> Any:
    known = target.config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    config = _OldConfig(**{name: getattr(known, name) for name in names}, rope_parameters=dict(known.rope_parameters))
    config.rope_theta = known.rope_parameters["rope_theta"]
    copy = ea_model.KVLlamaForCausalLM(config).to(target.device)
    missing, unexpected = copy.load_state_dict(target.state_dict(), strict=False, assign=True)
    astray = [key for key in (*missing, *unexpected) if not key.endswith("inv_freq")]
    if astray:
        raise ValueError(f"EAGLE's Llama has other weights than this target: {', '.join(astray)}.")
    return copy.requires_grad_(False).eval()


def _drafter_config(config: Any, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    found = {name: getattr(config, name) for name in names}
    found |= {"num_hidden_layers": 1, "pretraining_tp": 1, "pad_token_id": None, "bias": config.fc_bias}
    found |= {"rope_theta": config.rope_parameters["rope_theta"], "rope_scaling": None}
    if config.shape == "eagle3":
        found["draft_vocab_size"] = len(weights["lm_head.weight"])
    elif config.attention_bias:
        found["qkv_bias"] = True
    return found


def _drafter_class(base: Any, config: Any) -> Any:
    """EAGLE's drafter with a config's features and norm."""
    eagle3, features = config.shape == "eagle3", config.num_target_features
    norm_output = eagle3 and config.norm_output

    class Drafter(base):
        def __init__(self, settings: Any, load_emb: bool = False, **kwargs: Any):
            super().__init__(settings, load_emb=False, **kwargs)  # what it would load is among the weights
            if eagle3:
                self.fc = nn.Linear(features * settings.hidden_size, settings.hidden_size, bias=False)
                if features == 1:
                    self.fc = nn.Identity()
            if norm_output:
                self.fed_back_norm, self.norm = self.norm, nn.Identity()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return (self.fed_back_norm(output[0]), *output[1:]) if norm_output else output

    return Drafter


def _collect_features(model: Any, layers: list[int]) -> None:
    """Lets a target's forward return the states that the drafter reads, not those of EAGLE-3's three layers."""
    taken: dict[int, torch.Tensor] = {}

    def take(layer: int) -> Any:
        return lambda module, args: taken.__setitem__(layer, args[0])

    for layer in layers:
        if layer >= 0:
            model.layers[layer].register_forward_pre_hook(take(layer))
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        outputs.hidden_states = tuple(outputs[0] if layer == -1 else taken[layer] for layer in layers)
        return outputs

    model.forward = forward
