"""Greedy identity in float32 and acceptance length on real prompts: the check behind the shipped drafter's figures.

    python examples/check_real_prompts.py --data mt_bench.jsonl humaneval.jsonl gsm8k.jsonl cnn_dm.jsonl --json FILE

Answers the first 10 prompts of every file (first turns) with plain `generate` and with the drafter's chain of 5, both
in float32, compares them token by token and pools the acceptance length. Exit status 1 if any differs.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from coral_hf import CoralDraftModel, demo
from coral_hf.evaluation.benchmark import describe_drafter, measure
from coral_hf.evaluation.environment import describe_environment
from coral_hf.evaluation.prompts import encode_context, read_prompts
from coral_hf.generation.statistics import DraftStats


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "JSONL prompt files."})
    drafter: str = field(default="demo", metadata={"help": "Folder of the drafter, or 'demo'."})
    limit: int = field(default=10, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens per answer."})
    draft_depth: int = field(default=5, metadata={"help": "Levels drafted."})
    draft_top_k: int = field(default=1, metadata={"help": "Branches per node; 1 drafts a chain."})
    draft_total_tokens: int | None = field(default=None, metadata={"help": "Nodes verified, the root included."})
    dtype: str = field(default="float32", metadata={"help": "float32 proves identity; bfloat16 has near-ties."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def main() -> int:
    script = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(script.threads)
    dtype = getattr(torch, script.dtype)
    target, tokenizer = demo.load_target(dtype)
    drafter = demo.load_drafter(dtype)
    if script.drafter != "demo":
        drafter = CoralDraftModel.from_pretrained(script.drafter, dtype=dtype).eval()
    settings = {"draft_depth": script.draft_depth, "draft_top_k": script.draft_top_k}
    if script.draft_total_tokens is not None:
        settings["draft_total_tokens"] = script.draft_total_tokens
    pooled, different = {"all": DraftStats()}, []
    prompts = read_prompts(script.data, script.limit)
    for prompt in tqdm(prompts, unit="prompt"):
        ids = encode_context(tokenizer, prompt.turns[:1])
        plain = measure(target, ids, script.max_new_tokens)
        coral = measure(target, ids, script.max_new_tokens, drafter, **settings)
        if plain.new_ids != coral.new_ids:
            different.append(prompt.id)
        for name in ("all", prompt.benchmark):
            pooled[name] = pooled.get(name, DraftStats()).merge(coral.stats)
    record = {
        "n_prompts": len(prompts),
        "identical": len(prompts) - len(different),
        "different": different,
        "steps": {name: stats.steps for name, stats in pooled.items()},
        "accepted": {name: stats.n_accepted for name, stats in pooled.items()},
        "accepted_per_depth": pooled["all"].accepted_per_depth,
        "acceptance_length": {name: round(stats.acceptance_length, 4) for name, stats in pooled.items()},
        "acceptance_per_depth": [round(rate, 4) for rate in pooled["all"].acceptance_per_depth],
        "max_new_tokens": script.max_new_tokens,
        "settings": settings,
        "environment": describe_environment(target.device, dtype),
        **describe_drafter(drafter),
    }
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
