"""The section of docs/measurements.md that compares with EAGLE's code, other packages and other trainers."""

from typing import Any

from measured import RECORDS, ROOT, SETS, listed, machine, read, times
from operations import number

from coral_hf.hub.card_tables import table


FOLDER = f"{RECORDS}/rivals"
KINDS = ("operations", "kernels", "uploads", "waits")
METHODS = {"coral": "**CORAL, the shipped drafter**", "coral chain": "the same drafter, chain of {depth}"}


def _clock(row: dict[str, Any], wall: str, cpu: str) -> tuple[str, str]:
    """The key of a row's time and what it is: by the clock where that was measured."""
    return (wall, "") if wall in row else (cpu, " of CPU time")


def eagle() -> str:
    record = read(f"{FOLDER}/eagle.json")
    rows = []
    for name, label in (("coral", "CORAL"), ("eagle", "EAGLE")):
        row = record["methods"][name]
        key, unit = _clock(row, "milliseconds_outside", "cpu_milliseconds_outside")
        counts = [number(row["outside"][kind]) for kind in KINDS]
        rows.append([label, f"{row['steps']}", f"{row['tokens_per_step']:.2f}", *counts, f"{row[key]:.1f}"])
    adapted = listed(record["adapted"])
    return f"""### EAGLE's own code

EAGLE's own code and CORAL ran with the same drafter and target, on {record["n_prompts"]} prompts with {record["new_tokens"]} new tokens each. Decoding was
greedy. The trees had {record["draft_total_tokens"]} nodes, depth {record["draft_depth"]} and {record["draft_top_k"]} branches. {record["identical"]} of {record["n_prompts"]} answers are equal.
`benchmarks/rivals/eagle_reference.py` runs EAGLE's code from a checkout and lists the changes that loading needs. This drafter also
needed {adapted}. Per step, outside the target's forward pass (`{FOLDER}/eagle.json`, {machine(record)}):

{table(["code", "steps", "tokens per step", *KINDS, f"ms{unit}"], rows)}

Three of EAGLE's waits read tensors that it creates on the CPU. They would cost nothing on a GPU."""


def methods() -> str:
    record = read(f"{FOLDER}/methods.json")
    benchmarks = {name: record["benchmarks"][name] for name in SETS}
    first = next(iter(benchmarks.values()))
    key, unit = _clock(first["methods"]["plain"], "seconds", "cpu_seconds")
    names = {name: label.format(depth=record["draft_depth"]) for name, label in METHODS.items()}
    versions: dict[str, str] = {}
    for label, version in record["rivals"].items():
        versions.setdefault(label.partition(": ")[0], version)
    rows = []
    for name in (*names, *versions):
        speeds, taken = [], []
        for found in benchmarks.values():
            label = found["fastest"].get(name, name)
            row, plain = found["methods"][label], found["methods"]["plain"]
            speeds.append(times(plain[key] / row[key]))
            taken.append(label.partition(": ")[2])
            speeds.append(f"{row['tokens_per_step']:.2f}")
        equal = sum(found["methods"][found["fastest"].get(name, name)]["identical"] for found in benchmarks.values())
        chosen = f" ({', '.join(dict.fromkeys(taken))})" if taken[0] else ""
        rows.append([names.get(name, f"`{name}`, {versions.get(name)}{chosen}"), *speeds, str(equal)])
    total = sum(found["n_prompts"] for found in benchmarks.values())
    columns = [cell for name in SETS.values() for cell in (name, "tokens per step")]
    # the packages were changed in memory, each by its adapter in benchmarks/rivals/
    changed = [f"`{name}` ({listed(what)})" for name, what in record.get("adapted", {}).items()]
    adapted = (
        f"\n\nTo run this drafter, adapters changed these packages in memory: {listed(changed)}." if changed else ""
    )
    return f"""### Other ways to draft

Other methods that draft for this target in Transformers, on {total} prompts with {record["new_tokens"]} new tokens each. Speeds are relative to plain
`generate`{unit and ", by CPU time"}. If a method has settings, each column shows its fastest one. "Equal answers" counts
answers out of {total}. In float32, near-ties are rare. `benchmarks/compare_rivals.py` (`{FOLDER}/methods.json`, {machine(record)}):

{table(["method", *columns, "equal answers"], rows)}{adapted}"""


def trainers() -> str:
    record = read(f"{FOLDER}/trainers.json")
    rows = []
    for name, row in record["trainers"].items():
        key, unit = _clock(row, "tokens_per_second", "tokens_per_cpu_second")
        label = "`CoralTrainer`" if name == "coral" else row["version"]
        rows.append(
            [label, f"{row[key]:,.0f}", f"{row['peak_gib']:.1f} GiB", f"{row['peak_above_start_gib']:.2f} GiB"]
        )
    stops = [
        f"{row['version']} unchanged stops at `{row['published']['at']}` ({row['published']['stopped_by'].split(': ')[0]})"
        for row in record["trainers"].values()
        if row.get("published", {}).get("stopped_by")
    ]
    changed = [
        f"- {row['version']}: {'; '.join(row['changed'])}." for row in record["trainers"].values() if row["changed"]
    ]
    per = "CPU second" if unit else "second"
    return f"""### Other trainers

One EAGLE-3 training step of K = {record["steps"]} rollout steps over {record["batch"]} x {record["length"]:,} tokens of {record["target"]}, float32,
features given, the target's whole vocabulary, each trainer in its own process. `python benchmarks/compare_trainers.py`
(`{FOLDER}/trainers.json`, {machine(record)}):

{table(["trainer", f"tokens per {per}", "peak memory", "added by the step"], rows)}

`CoralTrainer`'s process also contains the target, which the others do not load. On a CPU, {listed(stops)}. Running them needed these changes:

{chr(10).join(changed)}"""


def rivals() -> str:
    """The parts whose records exist. Rivals are installed by hand, and each record is made separately."""
    made = [part() for part in (eagle, methods, trainers) if (ROOT / FOLDER / f"{part.__name__}.json").exists()]
    return "\n\n".join(["## Comparison with other projects", *made])


__all__ = ["rivals"]
