"""Time of the full LM head against the routed one, on fresh hidden states at every repetition.

python examples/benchmark_head.py --shape gemma3 --active 0.0625 --json FILE

Router MLP, selection and top-10 are inside the routed time, top-10 inside the full one. `byte_efficiency` is the time
that the active rows' bytes need at the copy bandwidth measured here, over the routed time for one row.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from coral_hf import TargetAdapter
from coral_hf.evaluation.environment import describe_environment
from coral_hf.lm_head_router import DraftHead, LMHeadRouter


SHAPES = {"smollm2": (49152, 576), "gemma3": (262144, 640)}  # V, H


@dataclass
class ScriptArguments:
    shape: str = field(default="smollm2", metadata={"help": f"One of {list(SHAPES)}."})
    active: float = field(default=0.0625, metadata={"help": "Share of the groups that is active."})
    groups: int = field(default=32, metadata={"help": "Groups of the router."})
    repeats: int = field(default=40, metadata={"help": "Paired repetitions."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the head."})
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


def copy_bandwidth(device: str) -> float:
    """Bytes read per second by a copy (reading and writing count once each, so half of the traffic is reading)."""
    source = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(9)]
    return 2 * source.numel() / statistics.median(times)


def main() -> None:
    script = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
    if script.shape not in SHAPES:
        raise SystemExit(f"--shape {script.shape} is unknown; choose one of {list(SHAPES)}.")
    torch.set_num_threads(script.threads)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, script.dtype)
    vocab_size, size = SHAPES[script.shape]
    # one small layer: only the head counts
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=size, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    adapter = TargetAdapter(LlamaForCausalLM(config).to(device=device, dtype=dtype).eval())
    router = LMHeadRouter(size, vocab_size, script.groups, size // 2).to(device=device, dtype=dtype).eval()
    active = max(1, round(script.active * script.groups))
    full, routed = DraftHead(adapter), DraftHead(adapter, router, active_groups=active)
    record = {
        "environment": describe_environment(torch.device(device), dtype),
        "shape": script.shape,
        "active": active / script.groups,
        "groups": script.groups,
    }
    for rows in (1, 10):
        ratios, routed_times, full_times = [], [], []
        for repeat in range(script.repeats + 5):
            hidden = torch.randn(2, 1, rows, size, dtype=dtype, device=device)  # fresh groups every time
            pair = [(full, hidden[0]), (routed, hidden[1])]
            timed = {
                id(head): seconds(lambda head=head, h=h: head.top_k(h, 10))
                for head, h in pair[:: 1 - 2 * (repeat % 2)]
            }
            if repeat >= 5:  # warm-up
                full_times.append(timed[id(full)])
                routed_times.append(timed[id(routed)])
                ratios.append(timed[id(full)] / timed[id(routed)])
        record[f"rows_{rows}"] = statistics.median(ratios)
        record[f"rows_{rows}_full_ms"] = 1e3 * statistics.median(full_times)
        record[f"rows_{rows}_routed_ms"] = 1e3 * statistics.median(routed_times)
    active_bytes = active * router.group_size * size * adapter.head.weight.element_size()
    record["byte_efficiency"] = active_bytes / copy_bandwidth(device) / (record["rows_1_routed_ms"] / 1e3)
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
