"""The paper's targets, from their published configs: shapes on the meta device, and recipes whose options exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, LlamaConfig, Qwen2Config

from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.cli import COMMANDS, _underscores
from coral_hf.training.arguments import CoralTrainingArguments


RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
TARGETS = {
    "llama-2-7b-chat": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "llama-3-8b-instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen2.5-7b-instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}
# fc + q, k, v, o + gate, up, down + the norm, by hand from the configs above
EAGLE_PARAMETERS = {
    "llama-2-7b-chat": 2 * 4096**2 + 4 * 4096**2 + 3 * 4096 * 11008 + 4096,
    "llama-3-8b-instruct": 2 * 4096**2 + 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4096,
    "qwen2.5-7b-instruct": 2 * 3584**2 + 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944 + 3584,
}


@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
@pytest.mark.parametrize("name", list(TARGETS))
def test_shapes_on_the_meta_device(name, shape):
    config = CoralDraftConfig.from_target(TARGETS[name], shape=shape, router_groups=64, shortlist_size=4096)
    with torch.device("meta"):
        drafter = CoralDraftModel(config)
        size = config.hidden_size
        outputs = drafter(torch.empty(2, 16, size), torch.empty(2, 16, size), num_steps=3, output_group_logits=True)
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(2, 16, size)] * 3
    assert [tuple(logits.shape) for logits in outputs.group_logits] == [(2, 16, 64)] * 3
    assert config.rope_parameters["rope_theta"] == TARGETS[name].rope_parameters["rope_theta"]
    if shape == "eagle":
        parameters = {key: p.numel() for key, p in drafter.named_parameters() if not key.startswith("router.")}
        assert sum(parameters.values()) == EAGLE_PARAMETERS[name]


def test_the_recipe_uses_options_that_exist(tmp_path):
    text = (RECIPES / "paper_target.sh").read_text().replace("\\\n", " ")
    verbs = []
    for line in text.splitlines():
        command = re.match(r"(?:coral-hf|accelerate launch -m coral_hf\.cli) (\w+) (.*)", line)
        if command is None:
            continue
        words = shlex.split(command[2].replace("$output", str(tmp_path)).replace("$target", "your/model"))
        verb = command[1]
        verbs.append(verb)
        if verb == "card":
            assert words == [f"{tmp_path}/routed"]
            continue
        types = [COMMANDS[verb]] + ([CoralTrainingArguments] if verb == "train" else [])
        parsed = HfArgumentParser(types).parse_args_into_dataclasses(args=_underscores(words))
        assert parsed[0].target == "your/model"
        if verb == "benchmark":  # on prompts that nothing was trained on, and where the card looks for it
            assert parsed[0].data == ["$eval_prompts"] and parsed[0].output == f"{tmp_path}/routed/training"
    assert verbs == ["regenerate", "train", "train", "benchmark", "card"]
    assert '--check_overlap "$eval_prompts"' in text
    named = re.findall(r"[\w-]+/([\w.-]+)", text.partition("TARGET: ")[2].splitlines()[0])
    assert [name.lower().removesuffix("-hf").removeprefix("meta-") for name in named] == list(TARGETS)
