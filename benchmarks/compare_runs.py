"""Compares the speedups of two runs of the same benchmark.

coral-hf benchmark --data prompts.jsonl --output outputs/first
coral-hf benchmark --data prompts.jsonl --output outputs/second
python benchmarks/compare_runs.py --runs outputs/first outputs/second --json FILE

`difference` is |first / second - 1| for a method's median speedup over all prompts of a benchmark and temperature. `all` pools
the prompts of all benchmarks.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.utils.jsonl import read_json


@dataclass
class ScriptArguments:
    runs: list[str] = field(metadata={"help": "Two folders with a benchmark.json each."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def speedups(record: dict) -> dict[tuple, float]:
    """Median speedup by method, benchmark and temperature, without plain decoding itself."""
    return {
        (row["method"], row["benchmark"], row["temperature"]): row["speedup"]
        for row in record["runs"]
        if row["method"] != "plain"
    }


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    if len(script.runs) != 2:
        raise ValueError(f"--runs takes two folders, got {len(script.runs)}.")
    records = [read_json(Path(folder) / "benchmark.json") for folder in script.runs]
    for name in ("target", "drafter_sha256"):
        if records[0].get(name) != records[1].get(name):
            raise SystemExit(
                f"--runs: they measured another {name} ({', '.join(str(one.get(name)) for one in records)})."
            )
    first, second = map(speedups, records)
    if first.keys() != second.keys():
        raise ValueError(f"--runs: {script.runs[0]} and {script.runs[1]} measured different methods or benchmarks.")
    rows = [
        {"method": method, "benchmark": benchmark, "temperature": temperature}
        | {"speedups": [value, second[key]], "difference": abs(value / second[key] - 1)}
        for key, value in first.items()
        for method, benchmark, temperature in [key]
    ]
    for row in rows:
        values = " and ".join(f"{value:.3f}" for value in row["speedups"])
        print(f"{row['method']:>16} {row['benchmark']:>12} {values}: {100 * row['difference']:.1f} %")
    if script.json is not None:
        shared = {name: records[0].get(name) for name in ("environment", "target", "drafter_sha256", "prompts")}
        record = {**shared, "rows": rows}
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
