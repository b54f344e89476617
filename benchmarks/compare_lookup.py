"""Compares acceptance lengths with and without lookup nodes, for a fixed tree and a chain, on the same prompts.

    python benchmarks/compare_lookup.py --data cnn_dm.jsonl --limit 8 --json benchmarks/records/lookup/cnn_dm.json

Every prompt is answered greedily. In float32 all methods must give the same tokens, and the script checks that they do.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coral_hf import coral_generate
from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import Prompt, encode_first_turn, read_prompts
from coral_hf.evaluation.environment import describe_drafter, describe_environment
from coral_hf.generation.statistics import DraftStats


SIZES = {
    "tree of 16": {"draft_depth": 5, "draft_top_k": 4, "draft_total_tokens": 16},
    "chain of 5": {"draft_depth": 5, "draft_top_k": 1},
}


@dataclass
class Arguments:
    data: list[str] = field(metadata={"help": "Prompt files."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of the drafter, or 'demo'."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the target."})
    limit: int = field(default=8, metadata={"help": "Prompts per file."})
    max_new_tokens: int = 64
    threads: int | None = None
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def compare(
    target: Any, tokenizer: Any, drafter: Any, prompts: list[Prompt], max_new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each file and size: tau without and with lookup nodes, and the share of steps that had no draft.

    Raises:
        RuntimeError: if methods give different tokens in an exact dtype.
    """
    stats: dict[tuple[str, str, bool], DraftStats] = {}
    for prompt in prompts:
        ids = encode_first_turn(tokenizer, prompt).to(target.device)
        answers = []
        for name, sizes in SIZES.items():
            for lookup in (False, True):
                settings = {**sizes, "draft_lookup": lookup, "draft_cost_aware": False}
                answer = coral_generate(
                    target, drafter, input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False, **settings
                )
                answers.append(answer)
                key = prompt.benchmark, name, lookup
                stats[key] = stats.get(key, DraftStats()).merge(drafter.last_stats)
        if target.dtype in (torch.float32, torch.float64) and any(not torch.equal(one, answers[0]) for one in answers):
            raise RuntimeError(f"{prompt.id}: the answers differ between methods.")
    rows = []
    for (benchmark, name, lookup), without in stats.items():
        if not lookup:
            found = stats[benchmark, name, True]
            rows.append(
                {
                    "benchmark": benchmark,
                    "size": name,
                    "tau": round(without.acceptance_length, 4),
                    "tau_with_lookup": round(found.acceptance_length, 4),
                    "ratio": round(found.acceptance_length / without.acceptance_length, 4),
                    "steps_without_a_draft": round(found.lookup_steps / max(found.steps, 1), 4),
                }
            )
    return rows


def main() -> None:
    (arguments,) = parse_script(Arguments)
    if arguments.json is not None:
        check_output_file(arguments.json)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    prompts = read_prompts(arguments.data, arguments.limit)
    target, tokenizer = load_target(arguments.target, arguments.dtype)
    drafter = load_drafter(arguments.drafter).to(device=target.device, dtype=target.dtype)
    rows = compare(target, tokenizer, drafter, prompts, arguments.max_new_tokens)
    for row in rows:
        print(json.dumps(row))
    if arguments.json is not None:
        record = {
            "prompts": [prompt.id for prompt in prompts],
            "max_new_tokens": arguments.max_new_tokens,
            **describe_drafter(drafter),
            "environment": describe_environment(target.device, target.dtype),
            "rows": rows,
        }
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
