"""Time of the full LM head against the routed one, on fresh hidden states at every repetition.

python benchmarks/benchmark_head.py --shape gemma3 --active 0.0625 --json FILE

Router MLP, selection and top-10 are inside the routed time, top-10 inside the full one. `byte_efficiency` is the time
that the active rows' bytes need at the copy bandwidth measured here, over the routed time for one row.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import TargetAdapter
from coral_hf.commands.loading import resolve_device, resolve_dtype
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.drafter.draft_head import DraftHead, LMHeadRouter
from coral_hf.drafter.few_rows import few_row_linears
from coral_hf.evaluation.environment import describe_environment


SHAPES = {"smollm2": (49152, 576), "gemma3": (262144, 640)}  # V, H


@dataclass
class ScriptArguments:
    shape: str = field(default="smollm2", metadata={"help": f"One of {list(SHAPES)}."})
    active: float = field(default=0.0625, metadata={"help": "Share of the groups that is active."})
    groups: int = field(default=32, metadata={"help": "Groups of the router."})
    grouping: str = field(default="consecutive", metadata={"help": "consecutive or clustered groups."})
    repeats: int = field(default=40, metadata={"help": "Paired repetitions."})
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


def compare(full: DraftHead, routed: DraftHead, rows: int, size: int, repeats: int) -> dict[str, float]:
    """Median of the paired ratios, and of both times in milliseconds, for `rows` rows."""
    ratios, times = [], {"full": [], "routed": []}
    adapter = full.adapter
    for repeat in range(repeats + 5):
        # fresh groups every time
        hidden = torch.randn(2, 1, rows, size, dtype=adapter.head_dtype, device=adapter.device)
        pair = [("full", full, hidden[0]), ("routed", routed, hidden[1])]
        timed = {
            name: seconds(lambda head=head, h=h: head.top_k(h, 10)) for name, head, h in pair[:: 1 - 2 * (repeat % 2)]
        }
        if repeat >= 5:  # warm-up
            ratios.append(timed["full"] / timed["routed"])
            for name, value in timed.items():
                times[name].append(value)
    found = {f"rows_{rows}": statistics.median(ratios)}
    return found | {f"rows_{rows}_{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}


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
    full, routed = DraftHead(adapter), DraftHead(adapter, router, active_groups=active)
    record = {
        "environment": describe_environment(device, dtype),
        "shape": script.shape,
        "active": active / script.groups,
        "groups": script.groups,
        "grouping": script.grouping,
    }
    # both as they are while `generate` runs
    with few_row_linears(model):
        for rows in (1, 10):
            record |= compare(full, routed, rows, size, script.repeats)
    active_bytes = active * router.group_size * size * adapter.head.weight.element_size()
    record["byte_efficiency"] = active_bytes / copy_bandwidth(device) / (record["rows_1_routed_ms"] / 1e3)
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
