"""The paper's targets, from their published configs: shapes on the meta device, and recipes whose options exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.published_targets import EAGLE_PARAMETERS, TARGETS
from transformers import HfArgumentParser

from coral_hf import CoralDraftConfig, CoralDraftModel
from coral_hf.cli import COMMANDS
from coral_hf.commands.parsing.parser import underscores
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.router_trainer import _group_logits


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
@pytest.mark.parametrize("name", list(TARGETS))
def test_shapes_on_the_meta_device(name, shape):
    config = CoralDraftConfig.from_target(TARGETS[name], shape=shape, router_groups=64, shortlist_size=4096)
    with torch.device("meta"):
        drafter = CoralDraftModel(config)
        size = config.hidden_size
        outputs = drafter(torch.empty(2, 16, size), torch.empty(2, 16, size), num_steps=3, scorer=_group_logits)
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(2, 16, size)] * 3
    assert [tuple(logits.shape) for logits in outputs.scores] == [(2, 16, 64)] * 3
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
        parsed = HfArgumentParser(types).parse_args_into_dataclasses(args=underscores(words))
        assert parsed[0].target == "your/model"
        if verb == "benchmark":  # on prompts that nothing was trained on, and where the card looks for it
            assert parsed[0].data == ["$eval_prompts"] and parsed[0].output == f"{tmp_path}/routed/training"
    assert verbs == ["regenerate", "train", "train", "benchmark", "card"]
    assert '--check-overlap "$eval_prompts"' in text
    named = re.findall(r"[\w-]+/([\w.-]+)", text.partition("TARGET: ")[2].splitlines()[0])
    assert [name.lower().removesuffix("-hf").removeprefix("meta-") for name in named] == list(TARGETS)
