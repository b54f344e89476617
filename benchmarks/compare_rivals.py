"""Another package's drafting beside CORAL's, on one target with one drafter: texts, verify steps and CPU seconds.

python benchmarks/compare_rivals.py --rival economize --drafter outputs/drafter --data prompts.jsonl --json FILE

Both draft chains of the same depth, greedily, so that verify steps are comparable. An adapter is a file in `rivals/` with a class
`Rival(target, drafter, depth)` that has a `version` and `answer(ids, max_new_tokens)`; rivals are installed by hand. Answers
have one length, because packages count what follows an EOS differently.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rivals import economize_eagle3

from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import encode_first_turn, read_prompts
from coral_hf.evaluation.environment import describe_drafter, describe_environment
from coral_hf.evaluation.methods import measure


RIVALS = {"economize": economize_eagle3.Rival}


@dataclass
class ScriptArguments:
    rival: str = field(metadata={"help": f"What to compare with: {', '.join(RIVALS)}."})
    drafter: str = field(metadata={"help": "Folder or Hub id of a drafter that both read."})
    data: list[str] = field(metadata={"help": "Prompts; first turns are answered."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="float32", metadata={"help": "Of both models."})
    limit: int = field(default=10, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of each answer."})
    depth: int = field(default=3, metadata={"help": "Tokens drafted per step."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def compare(target: Any, drafter: Any, rival: Any, prompts: list[torch.Tensor], new_tokens: int, depth: int) -> dict:
    """Rows by method over all prompts `[1, L]`: `identical` answers, `steps`, tokens per step and CPU seconds."""
    chain = {"draft_depth": depth, "draft_top_k": 1, "draft_total_tokens": None, "draft_cost_aware": False}

    def ours(ids):
        found = measure(target, ids, new_tokens, drafter, **chain)
        return found.new_ids, found.stats.steps

    def plain(ids):
        return measure(target, ids, new_tokens).new_ids, new_tokens - 1

    rows = {name: {"identical": 0, "steps": 0, "cpu_seconds": 0.0} for name in ("plain", "coral", "rival")}
    for ids in prompts:
        answers = {}
        for name, answer in (("plain", plain), ("coral", ours), ("rival", lambda ids: rival.answer(ids, new_tokens))):
            start = time.process_time()
            answers[name], steps = answer(ids)
            rows[name]["cpu_seconds"] += time.process_time() - start
            rows[name]["steps"] += steps
        for name, answer in answers.items():
            rows[name]["identical"] += answer == answers["plain"]
    for row in rows.values():
        # the prompt's forward gives each answer's first token
        row["tokens_per_step"] = len(prompts) * (new_tokens - 1) / row["steps"]
    return rows


def main() -> None:
    (args,) = parse_script(ScriptArguments)
    if args.rival not in RIVALS:
        raise ValueError(f"--rival {args.rival!r} is unknown; choose one of {', '.join(RIVALS)}.")
    if args.json is not None:
        check_output_file(args.json)
    torch.set_num_threads(args.threads)
    prompts = read_prompts(args.data, args.limit)
    drafter = load_drafter(args.drafter)
    target, tokenizer = load_target(args.target, args.dtype, "cpu")
    drafter.to(dtype=target.dtype)
    target.generation_config.eos_token_id = None
    rival = RIVALS[args.rival](target, drafter, args.depth)
    encoded = [encode_first_turn(tokenizer, prompt) for prompt in prompts]
    record = {
        "environment": describe_environment("cpu", target.dtype),
        "rival": rival.version,
        **describe_drafter(drafter),
        "n_prompts": len(encoded),
        "new_tokens": args.max_new_tokens,
        "draft_depth": args.depth,
        "methods": compare(target, drafter, rival, encoded, args.max_new_tokens, args.depth),
    }
    print(json.dumps(record, indent=2))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
