"""Compares a shared node budget for the rows of a batch with equal budgets: accepted tokens, replayed.

    python benchmarks/compare_row_budgets.py --data mt_bench.jsonl --limit 8 --json benchmarks/records/row_budgets.json

The drafter's trees are recorded at every token of the target's own answers. Batches of random tokens of different answers then
get a budget of nodes: the same number for every row, or the most likely nodes of all rows together. The second way needs a
forward pass without padding. If every row is padded to the largest tree, it costs `padded_nodes`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coral_hf import demo
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import describe_prompts, read_prompts
from coral_hf.evaluation.draft_traces import DraftTrace, record_traces
from coral_hf.evaluation.environment import describe_drafter, describe_environment, describe_target
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tree_size import Calibration, calibration_of


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "Prompts whose first turns are answered."})
    json: str = field(metadata={"help": "Write the record here."})
    limit: int = field(default=8, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=64, metadata={"help": "Per answer."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the demo pair."})
    draft_depth: int = field(default=5, metadata={"help": "Levels of the recorded trees."})
    draft_top_k: int = field(default=3, metadata={"help": "Branches of the recorded trees."})
    batches: int = field(default=2000, metadata={"help": "Random batches of each size."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})


def chances_of(trace: DraftTrace, calibration: Calibration | None) -> torch.Tensor:
    """Chances of acceptance `[P, M]` of the nodes below the root, none above its parent's."""
    chances = torch.ones_like(trace.scores)
    parents = trace.parents.clamp(min=0)
    for depth in range(1, trace.depth + 1):
        place = trace.level(depth)
        chance = trace.scores[:, place].exp()
        if calibration is not None:
            chance = calibration(chance, depth)
        chances[:, place] = torch.minimum(chance, chances.gather(1, parents[:, place]))
    return chances[:, 1:]


def compare(chances: torch.Tensor, accepted: torch.Tensor, rows: int, nodes: int, batches: int, seed: int = 0) -> dict:
    """Tokens per row and step, including the root's, if `rows` rows have `rows * nodes` nodes in total.

    Args:
        chances (`torch.Tensor` of shape `[P, M]`), accepted (`torch.BoolTensor` of shape `[P, M]`): for P tokens.
        rows (`int`), nodes (`int`), batches (`int`), seed (`int`)
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(chances), (batches, rows), generator=generator)
    own, right = chances[chosen], accepted[chosen]  # [batches, rows, M]
    equal = kept(own, nodes - 1)
    pooled = kept(own.flatten(1), rows * (nodes - 1)).view_as(own)
    sizes = 1 + pooled.sum(dim=-1)  # [batches, rows]
    padded = sizes.amax(dim=1)
    tokens = {
        name: 1 + float((mask & right).sum() / mask[..., 0].numel())
        for name, mask in (("equal", equal), ("pooled", pooled))
    }
    return {
        "rows": rows,
        "nodes": nodes,
        "tokens_equal": tokens["equal"],
        "tokens_pooled": tokens["pooled"],
        "gain": tokens["pooled"] / tokens["equal"] - 1,
        "padded_nodes": float(padded.float().mean()),
        "tokens_equal_at_padded": 1
        + sum(
            float((kept(own[padded == size], size - 1) & right[padded == size]).sum())
            for size in padded.unique().tolist()
        )
        / (batches * rows),
    }


def kept(chances: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` most likely nodes of the last dimension. Among equals, parents come before their children."""
    order = chances.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < count


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    torch.set_num_threads(script.threads)
    dtype = getattr(torch, script.dtype)
    target, tokenizer = demo.load_target(dtype)
    drafter = demo.load_drafter(dtype)
    prompts = read_prompts(script.data, script.limit)
    settings = DraftSettings(draft_depth=script.draft_depth, draft_top_k=script.draft_top_k)
    traces = record_traces(target, tokenizer, drafter, prompts, settings, script.max_new_tokens)
    calibration = calibration_of(drafter.config)
    chances = torch.cat([chances_of(trace, calibration) for trace in traces])
    accepted = torch.cat([trace.accepted[:, 1:] for trace in traces])
    record = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_target(target),
        **describe_drafter(drafter),
        **describe_prompts(prompts),
        "max_new_tokens": script.max_new_tokens,
        "draft_depth": script.draft_depth,
        "draft_top_k": script.draft_top_k,
        "tokens": len(chances),
        "rows": [
            compare(chances, accepted, rows, nodes, script.batches)
            for rows in (2, 4, 8)
            for nodes in (2, 3, 4, 6, 8, 12)
        ],
    }
    Path(script.json).write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(
            f"{row['rows']} rows x {row['nodes']} nodes: {row['tokens_equal']:.3f} tokens a step with as many each, "
            f"{row['tokens_pooled']:.3f} pooled ({row['gain']:+.1%}; padded to {row['padded_nodes']:.1f} nodes, where as many each "
            f"give {row['tokens_equal_at_padded']:.3f})"
        )


if __name__ == "__main__":
    run_script(main)
