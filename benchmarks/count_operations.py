"""Counts operations, kernels, uploads and host waits per decoding step, by the parts of a step.

    python benchmarks/count_operations.py --json outputs/operations.json
    python benchmarks/count_operations.py --tiny true --json benchmarks/records/operations_tiny.json

For one sequence, a GPU's time is mostly that of launches and waits. They can be counted on any device, in float32.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig

from coral_hf import CoralDraftModel, demo
from coral_hf.commands.scripts import run_script
from coral_hf.data.prompts import encode_context
from coral_hf.evaluation.demo_run import PROMPTS
from coral_hf.evaluation.environment import describe_drafter, describe_environment, describe_target
from coral_hf.evaluation.methods import PRESETS
from coral_hf.evaluation.operation_counts import count_step
from coral_hf.generation import hook
from coral_hf.generation.tree_size import DraftCosts


# name -> settings; None: no drafter
METHODS = {
    "plain": None,
    "prompt_lookup": PRESETS["prompt_lookup"],
    "chain_of_5": {"draft_depth": 5, "draft_top_k": 1},
    "tree_of_16": {"draft_depth": 5, "draft_top_k": 4, "draft_total_tokens": 16},
    "default": {},
    "tree_of_60": PRESETS["eagle2"],
}
# Costs for the default's rule, measured once (bfloat16, AVX-512, two threads), so that it decides the same everywhere.
COSTS = DraftCosts(tuple(25.0 + 0.65 * node for node in range(64)), 2.3, 1.3)


@dataclass
class Arguments:
    json: str = field(metadata={"help": "File for the record."})
    tiny: bool = field(default=False, metadata={"help": "A tiny random pair instead of the demo's."})
    max_new_tokens: int = field(default=64, metadata={"help": "Per prompt."})
    device: str = field(default="cpu", metadata={"help": "Device of both models."})


def tiny_pair() -> tuple:
    """A random target with a small vocabulary, so that drafts are accepted by chance, and its drafter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    target = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, eos_token_id=None)).double().eval()
    defaults = {"draft_depth": 8, "draft_top_k": 3, "draft_total_tokens": 16, "draft_cost_aware": True}
    drafter = CoralDraftModel.from_target(target, shape="eagle3", **defaults).double().eval()
    return target, drafter, [torch.tensor([[5, 9, 3, 7]])]


def demo_pair() -> tuple:
    """The demo's target, without an end of text, its drafter and prompts."""
    target, tokenizer = demo.load_target(torch.float32)
    target.generation_config.eos_token_id = None
    return target, demo.load_drafter(torch.float32), [encode_context(tokenizer, [text]) for text in PROMPTS]


def count(target, drafter, prompts, max_new_tokens: int) -> dict:
    """The record's entries for every method."""
    found = {}
    with patch.object(hook, "draft_costs", lambda *_: COSTS):
        for name, settings in METHODS.items():
            draft = any(key.startswith("draft_") for key in settings or {}) or settings == {}
            # prompt lookup ends where the prompt's own tokens would be drafted beyond the end
            found[name] = count_step(target, drafter if draft else None, prompts, max_new_tokens, **(settings or {}))
    return found


def main():
    arguments = HfArgumentParser(
        Arguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args_into_dataclasses()[0]
    target, drafter, prompts = tiny_pair() if arguments.tiny else demo_pair()
    target, drafter = target.to(arguments.device), drafter.to(arguments.device)
    record = {
        "environment": describe_environment(target.device, target.dtype),
        "max_new_tokens": arguments.max_new_tokens,
    }
    if not arguments.tiny:
        record |= describe_target(target) | describe_drafter(drafter)
    record["methods"] = count(target, drafter, prompts, arguments.max_new_tokens)
    path = Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record["methods"].items():
        print(f"{name}: {row['tokens_per_step']:.2f} tokens a step; " + _line(row["outside"]))
        for phase, counts in row["phases"].items():
            print(f"    {phase}: {_line(counts)}")


def _line(counts: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} {kind}" for kind, value in counts.items())


if __name__ == "__main__":
    run_script(main)
