"""Predicts speedups: compares predictions with a benchmark on this machine, or uses numbers entered manually.

    python benchmarks/predict_speedup.py --tune outputs/tune/tune.json --benchmark outputs/bench/benchmark.json
    python benchmarks/predict_speedup.py --plain_ms 25 --verify_ms 28 --draft_ms 6 --acceptance 0.8 0.75 0.7 --source "..."

A prediction needs the time of a plain step, the time of drafting and verifying, and the acceptance.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.evaluation.prediction import (
    WANTED_ERROR,
    check_predictions,
    drafter_of,
    expected_acceptance_length,
    predict_speedup,
)
from coral_hf.utils.jsonl import read_json


@dataclass
class Arguments:
    tune: str | None = field(default=None, metadata={"help": "tune.json of this machine."})
    benchmark: str | None = field(default=None, metadata={"help": "benchmark.json of the same machine and dtype."})
    json: str | None = field(default=None, metadata={"help": "Write the comparison to this file."})
    plain_ms: float | None = field(default=None, metadata={"help": "Time of a plain step of the target."})
    verify_ms: float | None = field(
        default=None, metadata={"help": "Time of its forward pass over the draft's nodes, T(n)."}
    )
    draft_ms: float | None = field(default=None, metadata={"help": "Time of drafting all levels."})
    acceptance: list[float] = field(default_factory=list, metadata={"help": "Conditional acceptance by depth."})
    acceptance_length: float | None = field(default=None, metadata={"help": "tau, instead of --acceptance."})
    source: str = field(default="entered by hand", metadata={"help": "Where the numbers come from."})


def check(arguments: Arguments) -> int:
    tuned, measured = (read_json(path) for path in (arguments.tune, arguments.benchmark))
    rows = check_predictions(tuned, measured)
    if not rows:
        raise ValueError("No method of the benchmark has sizes that tune.json covers: tune with a larger box.")
    for row in rows:
        print(
            f"{row['method']} on {row['benchmark']}, temperature {row['temperature']:g}: predicted "
            f"{row['predicted']:.2f}x, measured {row['measured']:.2f}x ({row['error']:+.1%})"
        )
    errors = [abs(row["error"]) for row in rows]
    within = sum(error <= WANTED_ERROR for error in errors)
    print(f"{within} of {len(rows)} within {WANTED_ERROR:.0%}; median error {median(errors):.1%}")
    if arguments.json is not None:
        origin = {
            "tune": {key: tuned.get(key) for key in ("target", "drafter_sha256")},
            "benchmark": {
                "target": measured.get("target"),
                "drafter_sha256": {row["method"]: drafter_of(measured, row["method"]) for row in rows},
            },
        }
        record = {"environment": measured["environment"], **origin, "rows": rows}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0 if within == len(rows) else 1


def main() -> int:
    (arguments,) = parse_script(Arguments)
    check_output_file(arguments.json)
    if arguments.tune and arguments.benchmark:
        return check(arguments)
    times = (arguments.plain_ms, arguments.verify_ms, arguments.draft_ms)
    length = arguments.acceptance_length
    if None in times or (length is None) == (not arguments.acceptance):
        raise ValueError(
            "Give --tune and --benchmark, or --plain_ms, --verify_ms, --draft_ms and one of --acceptance and "
            "--acceptance_length."
        )
    length = expected_acceptance_length(arguments.acceptance) if length is None else length
    speedup = predict_speedup(times[0], times[1] + times[2], length)
    print(f"predicted, not measured ({arguments.source}): tau {length:.2f}, speedup {speedup:.2f}x")
    return 0


if __name__ == "__main__":
    run_script(main)
