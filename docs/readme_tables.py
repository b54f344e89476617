"""The tables of README, made from the JSON records in the repository."""

from typing import Any

from batch_tables import coral_row
from measured import AVX2, OWN, RECORDS, SETS, listed, read, rows_of, times

from coral_hf.hub.card_tables import table


NAMES = {
    "coral": "**the shipped drafter** (cost-aware tree)",
    "tree_of_16": "the same, tree of 16 tokens",
    "chain_of_5": "the same, chain of 5",
    "prompt_lookup": "Transformers' prompt lookup (copies from the prompt)",
}


def results() -> str:
    """The shipped drafter compared with Transformers' own methods. The table's head names the machine."""
    record = read(f"{OWN}/benchmark.json")
    where = record["environment"]
    by_set = {key: rows_of(record, key) for key in ("all", *SETS)}
    rows = []
    for method, name in NAMES.items():
        tau = by_set["all"][method]["acceptance_length"]
        speedups = [times(found[method]["speedup"]) for found in by_set.values()]
        speedups[0] = f"**{speedups[0]}**" if method == "coral" else speedups[0]
        rows.append([name, *speedups, f"{tau:.2f}" if tau else ""])
    machine = f"{where['device']} CPU with AVX-512, {where['threads']} threads, {where['dtype']}, greedy"
    return table([machine, "speedup", *SETS.values(), "tau"], rows)


def help_by_size() -> str:
    """Measured, predicted and unknown speedups, by the size of the target."""
    shipped, large = read(f"{OWN}/benchmark.json"), read(f"{RECORDS}/large_vocabulary.json")
    slow = [row["speedup"] for name, row in rows_of(large).items() if name != "plain"]
    predicted = [row for row in read(f"{RECORDS}/predictions_7b.json")["rows"] if row["head"] == "full"]
    bounds = [row["predicted_speedup"] for row in predicted]
    gpus = " or ".join(dict.fromkeys(row["gpu"] for row in predicted))
    names = listed(list(dict.fromkeys(row["target"] for row in predicted)))
    rows = [
        ["SmolLM2-135M, shipped drafter", "1", _cpu(shipped), times(rows_of(shipped)["coral"]["speedup"]), "measured"],
        *_batches(),
        [
            "Gemma-3-270M, drafter trained for minutes",
            "1",
            _cpu(large),
            f"{times(min(slow))} to {times(max(slow))}: slower",
            "measured",
        ],
        [
            names,
            "1",
            gpus,
            f"at most {times(min(bounds))} to {times(max(bounds))}, by model and GPU",
            "predicted, not measured",
        ],
    ]
    return table(["target", "prompts at once", "device", "speedup", "how we know"], rows)


def _batches() -> list[list[str]]:
    """The shipped drafter on the slower kind of CPU: the range over the benchmarks."""
    records = [read(f"{AVX2}/batches_{key}.json") for key in SETS]
    sizes = records[0]["batch_sizes"]
    rows = []
    for some in (sizes[:1], sizes[1:-1], sizes[-1:]):
        label = " or ".join(str(size) for size in some)
        found = [coral_row(record, batch_size=size)["speedup"] for record in records for size in some]
        speedups = f"{times(min(found))} to {times(max(found))}"
        rows.append(["SmolLM2-135M, shipped drafter", label, f"{_cpu(records[0])}", speedups, "measured"])
    return rows


def _cpu(record: dict[str, Any]) -> str:
    where = record["environment"]
    return f"{where['threads']} CPU threads, {where['dtype']}"


BLOCKS = {"results": results, "help": help_by_size}


def with_tables(readme: str) -> str:
    """README with its tables written again."""
    for name, made in BLOCKS.items():
        start, end = f"<!-- {name}, written by docs/build_measurements.py -->\n", f"<!-- end of {name} -->"
        before, rest = readme.split(start)
        readme = f"{before}{start}\n{made()}\n\n{end}{rest.split(end)[1]}"
    return readme


__all__ = ["with_tables"]
