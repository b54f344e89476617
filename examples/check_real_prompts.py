"""Greedy identity in float32 and acceptance length on real prompts: the check behind the shipped drafter's figures.

    python examples/check_real_prompts.py --data mt_bench.jsonl humaneval.jsonl gsm8k.jsonl cnn_dm.jsonl \
        --method chain_of_5:draft_depth=5,draft_top_k=1 default --output FOLDER

Answers the first 10 prompts of every file (first turns) with plain `generate` and with every method, in float32,
compares them token by token and pools the acceptance length. Writes `check_NAME.json` for each method, after every
prompt, so that a stopped run leaves what it measured. Exit status 1 if any differs.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from coral_hf import CoralDraftModel, demo
from coral_hf.evaluation.benchmark import Method, describe_drafter, draft_settings, measure
from coral_hf.evaluation.environment import describe_environment
from coral_hf.evaluation.prompts import encode_context, read_prompts
from coral_hf.generation.statistics import DraftStats


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "JSONL prompt files."})
    drafter: str = field(default="demo", metadata={"help": "Folder of the drafter, or 'demo'."})
    method: list[str] = field(
        default_factory=lambda: ["chain_of_5:draft_depth=5,draft_top_k=1"],
        metadata={"help": "Draft settings to check, as NAME or NAME:setting=value,setting=value."},
    )
    limit: int = field(default=10, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens per answer."})
    dtype: str = field(default="float32", metadata={"help": "float32 proves identity; bfloat16 has near-ties."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    output: str | None = field(default=None, metadata={"help": "Folder for check_NAME.json."})


class Check:
    """What one method answered so far."""

    def __init__(self, method: Method):
        self.method, self.n_prompts = method, 0
        self.different: list[str] = []
        self.pooled = {"all": DraftStats()}

    def add(self, prompt: Any, plain: Any, coral: Any) -> None:
        self.n_prompts += 1
        if plain.new_ids != coral.new_ids:
            self.different.append(prompt.id)
        for name in ("all", prompt.benchmark):
            self.pooled[name] = self.pooled.get(name, DraftStats()).merge(coral.stats)

    def record(self) -> dict[str, Any]:
        return {
            "n_prompts": self.n_prompts,
            "identical": self.n_prompts - len(self.different),
            "different": self.different,
            "steps": {name: stats.steps for name, stats in self.pooled.items()},
            "accepted": {name: stats.n_accepted for name, stats in self.pooled.items()},
            "accepted_per_depth": self.pooled["all"].accepted_per_depth,
            "acceptance_length": {name: round(stats.acceptance_length, 4) for name, stats in self.pooled.items()},
            "acceptance_per_depth": [round(rate, 4) for rate in self.pooled["all"].acceptance_per_depth],
            "settings": draft_settings(self.method),
        }


def main() -> int:
    script = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(script.threads)
    dtype = getattr(torch, script.dtype)
    target, tokenizer = demo.load_target(dtype)
    drafter = demo.load_drafter(dtype)
    if script.drafter != "demo":
        drafter = CoralDraftModel.from_pretrained(script.drafter, dtype=dtype).eval()
    checks = [Check(Method.parse(text, drafter)) for text in script.method]
    shared = {
        "max_new_tokens": script.max_new_tokens,
        "environment": describe_environment(target.device, dtype),
        **describe_drafter(drafter),
    }
    for prompt in tqdm(read_prompts(script.data, script.limit), unit="prompt"):
        ids = encode_context(tokenizer, prompt.turns[:1])
        plain = measure(target, ids, script.max_new_tokens)
        for check in checks:
            check.add(prompt, plain, measure(target, ids, script.max_new_tokens, drafter, **check.method.settings))
            if script.output is not None:
                path = Path(script.output) / f"check_{check.method.name}.json"
                path.write_text(json.dumps({**check.record(), **shared}, indent=2) + "\n")
    for check in checks:
        record = check.record()
        print(check.method.name, json.dumps({name: record[name] for name in ("n_prompts", "identical")}))
        print(json.dumps(record["acceptance_length"]))
    return 1 if any(check.different for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
