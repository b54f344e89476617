"""Time of the full LM head and of four cheap ones that cost the same, on fresh hidden states at every repetition.

python benchmarks/benchmark_head.py --shape gemma3 --active 0.0625 --json FILE

The router's rows decide the cost: its active groups and its MLP, counted in rows of the head. Shortlist, low-rank head and in-context
list get as many (`head_costs.py`). Selection and top-10 are inside all times. `byte_efficiency` is the time that the router's
active rows need at the copy bandwidth measured here, over the routed time for one row.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from head_costs import low_rank_rows, rank_within, router_rows
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import TargetAdapter
from coral_hf.commands.loading import resolve_device, resolve_dtype
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.drafter.draft_head import DraftHead, FrequencyShortlist, LMHeadRouter, LowRankHead
from coral_hf.drafter.few_rows import few_row_linears
from coral_hf.evaluation.environment import describe_environment


SHAPES = {"smollm2": (49152, 576), "gemma3": (262144, 640)}  # V, H
WARM_UP = 5


@dataclass
class ScriptArguments:
    shape: str = field(default="smollm2", metadata={"help": f"One of {list(SHAPES)}."})
    active: float = field(default=0.0625, metadata={"help": "Share of the router's groups that is active."})
    groups: int = field(default=32, metadata={"help": "Groups of the router."})
    grouping: str = field(default="consecutive", metadata={"help": "consecutive or clustered groups."})
    candidates: int = field(default=64, metadata={"help": "Ids that the low-rank head scores exactly."})
    repeats: int = field(default=40, metadata={"help": "Repetitions, each of all heads in turn."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the head; auto: bfloat16 where it is computed natively."}
    )
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def seconds(function) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read per second by a copy (reading and writing count once each, so half of the traffic is reading)."""
    source = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(9)]
    return 2 * source.numel() / statistics.median(times)


def heads_of_equal_cost(
    adapter: TargetAdapter, router: LMHeadRouter, active: int, candidates: int
) -> tuple[dict[str, DraftHead], dict[str, dict[str, float]], list[torch.nn.Module]]:
    """The five heads, their sizes and costs in rows of the full head, and the modules that they compute with."""
    vocab_size, size = adapter.vocab_size, adapter.hidden_size
    like = {"device": adapter.device, "dtype": adapter.head_dtype}
    budget = router_rows(router, size) + active * router.group_size
    listed = min(vocab_size - 1, round(budget))
    rank = rank_within(budget, candidates, vocab_size, size)
    low_rank = LowRankHead(size, vocab_size, rank).to(**like).eval()
    # half of the list is there from the first, and half comes with the text
    context = DraftHead(adapter, None, FrequencyShortlist(listed // 2), reads_text=True)
    context.read(torch.arange(listed // 2, listed))
    heads = {
        "full": DraftHead(adapter),
        "routed": DraftHead(adapter, router, active_groups=active),
        "shortlist": DraftHead(adapter, None, FrequencyShortlist(listed)),
        "low_rank": DraftHead(adapter, low_rank=low_rank, candidates=candidates),
        "context": context,
    }
    sizes = {
        "full": {"cost_rows": vocab_size},
        "routed": {"cost_rows": budget, "active_groups": active},
        "shortlist": {"cost_rows": listed, "ids": listed},
        "low_rank": {"cost_rows": low_rank_rows(rank, candidates, vocab_size, size), "rank": rank},
        "context": {"cost_rows": listed, "ids": listed},
    }
    return heads, sizes, [router, low_rank]


def compare(heads: dict[str, DraftHead], rows: int, size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Of each head the median of its milliseconds for `rows` rows, and of the full head's time over its own."""
    names, times = list(heads), {name: [] for name in heads}
    adapter = heads["full"].adapter
    for repeat in range(repeats + WARM_UP):
        # fresh groups every time, and another head first
        hidden = torch.randn(len(names), 1, rows, size, dtype=adapter.head_dtype, device=adapter.device)
        turn = repeat % len(names)
        for index in (*range(turn, len(names)), *range(turn)):
            taken = seconds(lambda index=index, hidden=hidden: heads[names[index]].top_k(hidden[index], 10))
            if repeat >= WARM_UP:
                times[names[index]].append(taken)
    ratios = {
        name: [full / own for full, own in zip(times["full"], values, strict=True)] for name, values in times.items()
    }
    return {
        name: {
            f"rows_{rows}_ms": 1e3 * statistics.median(values),
            f"rows_{rows}": statistics.median(ratios[name]),
        }
        for name, values in times.items()
    }


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    if script.shape not in SHAPES:
        raise ValueError(f"--shape {script.shape} is unknown; choose one of {list(SHAPES)}.")
    check_output_file(script.json)
    torch.set_num_threads(script.threads)
    device = resolve_device(None)
    dtype = resolve_dtype(script.dtype, device)
    vocab_size, size = SHAPES[script.shape]
    # one small layer: only the head counts
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=size, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()
    adapter = TargetAdapter(model)
    router = LMHeadRouter(size, vocab_size, script.groups, size // 2, clustered=script.grouping == "clustered")
    router = router.to(device=device, dtype=dtype).eval()
    active = max(1, round(script.active * script.groups))
    heads, measured, modules = heads_of_equal_cost(adapter, router, active, script.candidates)
    record = {
        "environment": describe_environment(device, dtype),
        "shape": script.shape,
        "active": active / script.groups,
        "groups": script.groups,
        "grouping": script.grouping,
        "candidates": script.candidates,
    }
    # all as they are while `generate` runs
    with few_row_linears(model, *modules):
        for rows in (1, 10):
            for name, found in compare(heads, rows, size, script.repeats).items():
                measured[name] |= found
            record |= {f"rows_{rows}": measured["routed"][f"rows_{rows}"]}
            record |= {f"rows_{rows}_{name}_ms": measured[name][f"rows_{rows}_ms"] for name in ("full", "routed")}
    active_bytes = active * router.group_size * size * adapter.head.weight.element_size()
    record["byte_efficiency"] = active_bytes / copy_bandwidth(device) / (record["rows_1_routed_ms"] / 1e3)
    record["heads"] = measured
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
