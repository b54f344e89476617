"""Compares cost-aware trees with twelve fixed sizes and EAGLE-2's own size, in one paired run.

    coral-hf tune --data mt_bench.jsonl humaneval.jsonl gsm8k.jsonl --dtype float32 --output outputs/tune
    python benchmarks/compare_tree_sizes.py --data mt_bench.jsonl humaneval.jsonl gsm8k.jsonl --dtype float32 \
        --tune outputs/tune/tune.json --output outputs/sizes
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch

from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import read_prompts
from coral_hf.evaluation.benchmark import print_table, run_benchmark
from coral_hf.evaluation.methods import PRESETS, Method


NAMES = ("draft_depth", "draft_top_k", "draft_total_tokens")
CHAINS = [(2, 1, 3), (3, 1, 4), (5, 1, 6)]
TREES = [(2, 3, 4), (3, 2, 6), (4, 2, 6), (3, 3, 8), (4, 3, 8), (4, 3, 12), (5, 3, 12), (6, 4, 16), (6, 4, 24)]
COST_AWARE = ((8, 3, 16), (8, 4, 32))


@dataclass
class Arguments:
    data: list[str] = field(metadata={"help": "Prompt files."})
    output: str = field(metadata={"help": "Folder for benchmark.json and sizes.json."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of the drafter, or 'demo'."})
    tune: str | None = field(default=None, metadata={"help": "tune.json: its calibration and its best fixed tree."})
    dtype: str = field(default="auto", metadata={"help": "auto: bfloat16 where it is computed natively."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    limit: int = field(default=4, metadata={"help": "Prompts per file."})
    max_new_tokens: int = 48
    threads: int | None = None


def summary(record: dict, eagle2: str, tuned: str) -> list[dict]:
    """The speedup of each cost-aware setting relative to the others, by benchmark and for their mean."""
    speedups = {(row["method"], row["benchmark"]): row["speedup"] for row in record["runs"]}
    benchmarks = sorted({benchmark for _, benchmark in speedups if benchmark != "all"})
    for method in record["methods"]:
        speedups[method, "mean"] = mean(speedups[method, benchmark] for benchmark in benchmarks)
    fixed = [name for name in record["methods"] if name.startswith("fixed")]
    rows = []
    for method in (name for name in record["methods"] if name.startswith("cost_aware")):
        for benchmark in [*benchmarks, "mean"]:
            best = max(fixed, key=lambda name: speedups[name, benchmark])
            own = speedups[method, benchmark]
            over = {"best_fixed": best, "eagle2": eagle2, "tuned": tuned}
            shares = {f"over_{name}": own / speedups[other, benchmark] for name, other in over.items()}
            rows.append({"method": method, "benchmark": benchmark, "speedup": own, "best_fixed": best, **shares})
    return rows


def main():
    (arguments,) = parse_script(Arguments)
    check_output_folder(arguments.output)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    prompts = read_prompts(arguments.data, arguments.limit)
    target, tokenizer = load_target(arguments.target, arguments.dtype, arguments.device)
    drafter = load_drafter(arguments.drafter).to(device=target.device, dtype=target.dtype)
    methods = {f"fixed_{d}_{k}_{n}": dict(zip(NAMES, (d, k, n), strict=True)) for d, k, n in (*CHAINS, *TREES)}
    methods["eagle2"] = PRESETS["eagle2"]
    tuned = None
    if arguments.tune is not None:
        record = json.loads(Path(arguments.tune).read_text())
        drafter.config.draft_calibration = record["calibration"]
        tree = next(row for row in record["fixed"] if row["draft_top_k"] > 1)
        tuned, methods["tuned"] = "tuned", {name: tree[name] for name in NAMES}
    for d, k, n in COST_AWARE:
        methods[f"cost_aware_{d}_{k}_{n}"] = {**dict(zip(NAMES, (d, k, n), strict=True)), "draft_cost_aware": True}
    methods = [Method(name, drafter, settings) for name, settings in methods.items()]
    record = run_benchmark(target, tokenizer, methods, prompts, arguments.output, arguments.max_new_tokens)
    print_table(record)
    if tuned is None:  # then the best of the grid's trees replaces it
        trees = [row for row in record["runs"] if row["benchmark"] == "all" and row["method"].startswith("fixed")]
        tuned = max((row for row in trees if "_1_" not in row["method"]), key=lambda row: row["speedup"])["method"]
    rows = summary(record, "eagle2", tuned)
    (Path(arguments.output) / "sizes.json").write_text(json.dumps({"tuned": tuned, "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['method']} on {row['benchmark']}: {row['speedup']:.2f}x, {row['over_best_fixed']:.1%} of the best fixed "
            f"({row['best_fixed']}), {row['over_eagle2']:.1%} of EAGLE-2's own, {row['over_tuned']:.1%} of {tuned}"
        )


if __name__ == "__main__":
    run_script(main)
