"""Measures the parts of a step's time and the memory of a prefill at a long context, with the demo pair.

    python benchmarks/measure_long_context.py --data mt_bench.jsonl --context 4096 --json FILE

Peak memory is that of a separate process (on Linux), with and without a drafter, which answers one prompt with two tokens. To
measure the speedup at a context, use `coral-hf benchmark --context`.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coral_hf import demo
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import describe_prompts, read_prompts
from coral_hf.evaluation.batches import lengthened
from coral_hf.evaluation.environment import describe_drafter, describe_environment, describe_target
from coral_hf.evaluation.methods import measure
from coral_hf.evaluation.step_profile import profile_step


# explicit sizes, so that no costs are measured in the process whose memory counts
CHAIN = {"draft_depth": 3, "draft_top_k": 1}


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "Prompts, extended to the context with each other's text."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})
    context: int = field(default=4096, metadata={"help": "Tokens of a prompt."})
    prompts: int = field(default=2, metadata={"help": "Prompts whose steps are timed."})
    max_new_tokens: int = field(default=48, metadata={"help": "Per prompt."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the demo pair."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    peak_of: str | None = field(
        default=None, metadata={"help": "Only print the peak memory of this process: 'plain' or 'coral'."}
    )


def peak_megabytes(script: ScriptArguments) -> float:
    """Peak memory of this process during a prefill and two tokens, including weights."""
    ids, target, drafter = load(script, drafter=script.peak_of == "coral")
    # resets the peak, because reading the weights takes more memory than the weights
    Path("/proc/self/clear_refs").write_text("5")
    measure(target, ids[0], 2, drafter, **(CHAIN if drafter is not None else {}))
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def load(script: ScriptArguments, drafter: bool) -> tuple[list[torch.Tensor], Any, Any]:
    """Prompts `[1, L]`, the target and its drafter."""
    dtype = getattr(torch, script.dtype)
    target, tokenizer = demo.load_target(dtype)
    prompts = read_prompts(script.data)
    ids = [torch.tensor([lengthened(tokenizer, prompts, index, script.context)]) for index in range(script.prompts)]
    return ids, target, demo.load_drafter(dtype) if drafter else None


def in_own_process(script: ScriptArguments, kind: str) -> float:
    """[`peak_megabytes`] of another process."""
    command = [sys.executable, __file__, "--data", *script.data, "--peak_of", kind]
    for name in ("context", "dtype", "threads"):
        command += [f"--{name}", str(getattr(script, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    torch.set_num_threads(script.threads)
    if script.peak_of is not None:
        print(peak_megabytes(script))
        return
    check_output_file(script.json)
    peaks = {kind: in_own_process(script, kind) for kind in ("plain", "coral")}
    ids, target, drafter = load(script, drafter=True)
    steps = {
        name: profile_step(target, drafter, ids, script.max_new_tokens, **settings)
        for name, settings in {"default": {}, "chain_of_3": CHAIN}.items()
    }
    record = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_target(target),
        **describe_drafter(drafter),
        **describe_prompts(read_prompts(script.data)),
        "context": [len(row[0]) for row in ids],
        "max_new_tokens": script.max_new_tokens,
        "peak_megabytes": peaks,
        "peak_ratio": peaks["coral"] / peaks["plain"],
        "milliseconds": steps,
    }
    print(json.dumps({name: record[name] for name in ("peak_megabytes", "peak_ratio", "milliseconds")}, indent=1))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
