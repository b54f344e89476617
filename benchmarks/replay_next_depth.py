"""Replays a cost-aware rule that decides the next step's depth, so that the host would not wait while drafting.

    python benchmarks/replay_next_depth.py --data mt_bench.jsonl gsm8k.jsonl --limit 3 --json FILE

Drafts once at every token of plain answers (`coral_hf.evaluation.draft_traces`) and replays rules on them: the current rule,
which decides after every second level; the same rule, deciding after every level; and rules that draft to a depth that the step
before decided. That depth is the level at which the rule would have stopped, or one or two levels more if it would not have
stopped. Times come from a record of `coral-hf tune`, and from a device on which nodes are nearly free.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coral_hf import demo
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import read_prompts
from coral_hf.evaluation.draft_traces import DraftTrace, Replay, record_traces, replay
from coral_hf.evaluation.environment import describe_drafter, describe_environment, describe_target
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tree_size import DraftCosts, TreeSizeRule, calibration_of


DEPTH, TOP_K, TOTAL = 8, 3, 16
TUNED = Path(__file__).parent / "records" / "float32_avx2" / "tune.json"
FIRST = 4  # the depth of a text's first step
POLICIES = ("asks after every other level", "asks after every level", "next depth", "next depth, at most one more")


@dataclass
class Arguments:
    data: list[str] = field(metadata={"help": "Prompts."})
    json: str = field(metadata={"help": "File for the record."})
    limit: int = field(default=3, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=48, metadata={"help": "Per answer."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


class EveryLevel(TreeSizeRule):
    @staticmethod
    def asks(levels: int) -> bool:
        return True


class NoLevel(TreeSizeRule):
    @staticmethod
    def asks(levels: int) -> bool:
        return False


def costs() -> dict[str, DraftCosts]:
    """The step times to use, by name."""
    tuned = json.loads(TUNED.read_text())
    drafting = next(row for row in tuned["drafting"] if row["draft_top_k"] == TOP_K)
    levels = drafting["first_level_ms"], drafting["level_ms"]
    flat = tuple(25 + 0.02 * nodes for nodes in range(TOTAL))
    return {
        "float32_avx2/tune.json": DraftCosts(tuple(tuned["target_ms"][:TOTAL]), *levels),
        "25 ms for any tree, 1.5 ms a level": DraftCosts(flat, 3.0, 1.5),
    }


def walked(traces: Sequence[DraftTrace], policy: str, times: DraftCosts, calibration: Any) -> dict[str, float]:
    """The steps of a policy over all answers."""
    box = DraftSettings(DEPTH, TOP_K, TOTAL)
    steps = tokens = levels = 0
    milliseconds = 0.0
    for trace in traces:
        kind = TreeSizeRule if policy == POLICIES[0] else EveryLevel
        stops = replay(trace, box, kind(times, TOTAL), calibration).levels
        at: dict[int, Replay] = {}
        for depth in range(1, DEPTH + 1):
            most = min(TOTAL, DraftSettings(depth, TOP_K, None).draft_total_tokens)
            size = replace(box, draft_depth=depth, draft_total_tokens=most)
            at[depth] = replay(trace, size, NoLevel(times, TOTAL), calibration)
        place, last, following = 0, trace.num_tokens - 1, FIRST
        while place < last:
            stop = int(stops[place])
            depth = max(min(following if policy.startswith("next") else stop, last - place - 1), 1)
            accepted = min(int(at[depth].accepted[place]), last - place - 1)
            milliseconds += times.step_ms(depth, int(at[depth].nodes[place]))
            steps, tokens, levels = steps + 1, tokens + accepted + 1, levels + depth
            following = stop if stop <= depth else min(depth + (1 if "one more" in policy else 2), DEPTH)
            place += accepted + 1
    return {
        "steps": steps,
        "levels_per_step": levels / steps,
        "tokens_per_step": tokens / steps,
        "tokens_per_second": 1000 * tokens / milliseconds,
    }


def main() -> None:
    (arguments,) = parse_script(Arguments)
    check_output_file(arguments.json)
    torch.set_num_threads(arguments.threads)
    target, tokenizer = demo.load_target(torch.float32)
    drafter = demo.load_drafter(torch.float32)
    prompts = read_prompts(arguments.data, arguments.limit)
    settings = DraftSettings(DEPTH, TOP_K, TOTAL)
    traces = record_traces(target, tokenizer, drafter, prompts, settings, arguments.max_new_tokens)
    calibration, record = calibration_of(drafter.config), {}
    for name, times in costs().items():
        rows = {policy: walked(traces, policy, times, calibration) for policy in POLICIES}
        for row in rows.values():
            for figure in ("tokens_per_step", "tokens_per_second"):
                row[f"{figure}_ratio"] = row[figure] / rows[POLICIES[0]][figure]
        record[name] = rows
    about = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_target(target),
        **describe_drafter(drafter),
        "n_answers": len(traces),
        "prompts": [trace.prompt for trace in traces],
        "max_new_tokens": arguments.max_new_tokens,
    }
    Path(arguments.json).write_text(json.dumps({**about, "costs": record}, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    run_script(main)
