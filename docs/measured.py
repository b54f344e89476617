"""Reads the records for docs/build_measurements.py, and formats their figures."""

import json
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
RECORDS = "benchmarks/records"
OWN = "model_cards/smollm2-135m-instruct-coral/training"
AVX2 = f"{RECORDS}/float32_avx2"
SETS = {"mt_bench": "MT-bench", "humaneval": "HumanEval", "gsm8k": "GSM8K"}


def read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text())


def rows_of(record: dict[str, Any], benchmark: str = "all") -> dict[str, dict[str, Any]]:
    """A benchmark's greedy rows by method."""
    return {row["method"]: row for row in record["runs"] if row["benchmark"] == benchmark and not row["temperature"]}


def answers(row: dict[str, Any]) -> int:
    """The number of answers of a row. The oldest records call them prompts."""
    return row.get("n_turns", row["n_prompts"])


def percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def times(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}x"


def listed(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def machine(record: dict[str, Any]) -> str:
    """The machine, commit and drafter of a record."""
    where = record["environment"]
    parts = [f"{where['device']}, {where['dtype']}, {where['threads']} threads", f"commit {where['commit']}"]
    if "drafter_sha256" in record:
        parts.append(f"drafter {record['drafter_sha256'][:8]}")
    return "; ".join(parts)
