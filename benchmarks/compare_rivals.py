"""Compares other ways to draft with CORAL, on one target: texts, verification steps, and seconds.

python benchmarks/compare_rivals.py --rival economize --drafter outputs/drafter --data prompts.jsonl --json FILE
python benchmarks/compare_rivals.py --rival prompt_lookup dejavuu flashspec --data prompts.jsonl --json FILE

`coral` drafts with its drafter's settings. `coral chain` drafts chains of --depth, like economize with the same drafter. An
adapter is a file in `rivals/` with a class `Rival(target, drafter, depth)` that has a `version` and `answer(ids, max_new_tokens)`.
It may also have `adapted`, a list of the changes that it makes to the package in memory. The record contains the list.
A rival with its own settings names some as `VARIANTS`, which are all measured; `fastest` names the one with the least CPU time on
these prompts. Install rivals manually. All answers have the same length, because packages count tokens after an EOS differently.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rivals import dejavuu_lookup, economize_eagle3, flashspec_lookup, prompt_lookup

from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import encode_first_turn, read_prompts
from coral_hf.evaluation.environment import describe_drafter, describe_environment
from coral_hf.evaluation.methods import measure


RIVALS = {
    "economize": economize_eagle3.Rival,
    "prompt_lookup": prompt_lookup.Rival,
    "dejavuu": dejavuu_lookup.Rival,
    "flashspec": flashspec_lookup.Rival,
}
_WARM_UP = 8  # tokens


@dataclass
class ScriptArguments:
    rival: list[str] = field(metadata={"help": f"What to compare with: {', '.join(RIVALS)}."})
    data: list[str] = field(metadata={"help": "Prompts; first turns are answered."})
    drafter: str = field(default=DEMO, metadata={"help": "Folder or Hub id of a drafter that all read, or 'demo'."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of both models."})
    limit: int = field(default=10, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of each answer."})
    depth: int = field(default=3, metadata={"help": "Tokens drafted per step, by methods that draft chains."})
    wall: bool = field(default=True, metadata={"help": "Also record times by the clock; not beside other work."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def make_rivals(names: list[str], target: Any, drafter: Any, depth: int) -> dict[str, Any]:
    """The rivals that were asked for, one to each of their variants, by `NAME` or `NAME: VARIANT`.

    Raises:
        ValueError: if a name is unknown, or a rival cannot express the drafter.
        ImportError: if a rival is not installed.
    """
    found = {}
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"--rival {name!r} is unknown; choose from {', '.join(RIVALS)}.")
        kind = RIVALS[name]
        for variant, settings in getattr(kind, "VARIANTS", {None: {}}).items():
            found[name if variant is None else f"{name}: {variant}"] = kind(target, drafter, depth, **settings)
    return found


def compare(
    target: Any, drafter: Any, rivals: dict[str, Any], prompts: list[torch.Tensor], new_tokens: int, depth: int
) -> dict[str, dict[str, Any]]:
    """Rows by method over all prompts `[1, L]`: `identical` answers, `steps`, tokens per step, and seconds.

    All methods answer a prompt before the next prompt is answered, in an order that rotates from prompt to prompt.
    """
    chain = {"draft_depth": depth, "draft_top_k": 1, "draft_total_tokens": None, "draft_cost_aware": False}

    def coral(ids, **settings):
        found = measure(target, ids, new_tokens, drafter, **settings)
        return found.new_ids, found.stats.steps

    answering = {
        "plain": lambda ids: (measure(target, ids, new_tokens).new_ids, new_tokens - 1),
        "coral": coral,
        "coral chain": lambda ids: coral(ids, **chain),
        **{name: lambda ids, rival=rival: rival.answer(ids, new_tokens) for name, rival in rivals.items()},
    }
    # what is made once per target and method; another text, because some remember what they answered
    other = prompts[0].flip(1)
    for drafting in (None, drafter):
        measure(target, other, _WARM_UP, drafting)
    for rival in rivals.values():
        rival.answer(other, _WARM_UP)
    rows: dict[str, dict[str, Any]] = {
        name: {"identical": 0, "steps": 0, "cpu_seconds": 0.0, "seconds": 0.0} for name in answering
    }
    order = list(answering)
    for ids in prompts:
        answers = {}
        for name in order:
            start, cpu_start = time.perf_counter(), time.process_time()
            answers[name], steps = answering[name](ids)
            rows[name]["cpu_seconds"] += time.process_time() - cpu_start
            rows[name]["seconds"] += time.perf_counter() - start
            rows[name]["steps"] += steps
        for name, answer in answers.items():
            rows[name]["identical"] += answer == answers["plain"]
        order = [*order[1:], order[0]]
    for row in rows.values():
        # the prefill gives each answer's first token
        row["tokens_per_step"] = len(prompts) * (new_tokens - 1) / row["steps"]
    return rows


def fastest_variants(names: list[str], rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The row with the least CPU time of each rival that was measured with several settings."""
    found = {}
    for name in names:
        variants = [label for label in rows if label.startswith(f"{name}: ")]
        if variants:
            found[name] = min(variants, key=lambda label: rows[label]["cpu_seconds"])
    return found


def main() -> None:
    (args,) = parse_script(ScriptArguments)
    if args.json is not None:
        check_output_file(args.json)
    torch.set_num_threads(args.threads)
    prompts = read_prompts(args.data, args.limit)
    drafter = load_drafter(args.drafter)
    target, tokenizer = load_target(args.target, args.dtype, "cpu")
    drafter.to(dtype=target.dtype)
    target.generation_config.eos_token_id = None
    rivals = make_rivals(args.rival, target, drafter, args.depth)
    by_benchmark: dict[str, list[torch.Tensor]] = {}
    for prompt in prompts:
        by_benchmark.setdefault(prompt.benchmark, []).append(encode_first_turn(tokenizer, prompt))
    found = {}
    for name, ids in by_benchmark.items():
        rows = compare(target, drafter, rivals, ids, args.max_new_tokens, args.depth)
        if not args.wall:
            for row in rows.values():
                del row["seconds"]
        found[name] = {"n_prompts": len(ids), "fastest": fastest_variants(args.rival, rows), "methods": rows}
        print(name, json.dumps(found[name], indent=2), flush=True)
    record = {
        "environment": describe_environment("cpu", target.dtype),
        "rivals": {name: rival.version for name, rival in rivals.items()},
        "adapted": {name: rival.adapted for name, rival in rivals.items() if getattr(rival, "adapted", None)},
        **describe_drafter(drafter),
        "new_tokens": args.max_new_tokens,
        "draft_depth": args.depth,
        "benchmarks": found,
    }
    if args.json is not None:
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
