"""The sections of docs/measurements.md on the operations of a step, and on compiled steps."""

from typing import Any

from measured import AVX2, RECORDS, SETS, answers, machine, read, rows_of, times

from coral_hf.hub.card_tables import table


NAMES = {
    "plain": "plain `generate`",
    "prompt_lookup": "Transformers' prompt lookup",
    "chain_of_5": "chain of 5",
    "tree_of_16": "tree of 16 (depth 5)",
    "default": "shipped default (cost-aware)",
    "tree_of_60": "tree of 60 (depth 6)",
}
KINDS = ("operations", "kernels", "uploads", "waits")
PHASES = ("draft", "tree", "masks", "acceptance", "compaction", "bookkeeping")


def number(value: float) -> str:
    """Waits and uploads are few, operations many."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def operations_of(row: dict[str, Any], phase: str) -> str:
    return number(row["phases"][phase]["operations"]) if phase in row["phases"] else ""


def operations() -> str:
    record = read(f"{RECORDS}/operations.json")
    before = read(f"{RECORDS}/operations_before.json")["methods"]
    methods = record["methods"]
    plain = methods["plain"]["phases"]["target_forward"]["operations"]

    def extra(row: dict[str, Any]) -> str:
        return f"{100 * (row['phases']['target_forward']['operations'] / plain - 1):.1f} %"

    rows = []
    for name, label in NAMES.items():
        now, then = methods[name], before[name]
        pairs = [f"{number(then['outside'][kind])} / {number(now['outside'][kind])}" for kind in KINDS]
        rows.append([label, *pairs, f"{extra(then)} / {extra(now)}"])
    drafted = [name for name in NAMES if name not in ("plain", "prompt_lookup")]
    phases = [[NAMES[name], *(operations_of(methods[name], phase) for phase in PHASES)] for name in drafted]
    return f"""## What a step asks of a device

On a GPU, kernel launches and waits determine the time of a step of one sequence. The table counts, per decoding step of the demo
pair and outside the target's forward pass:

- operations that PyTorch dispatches
- kernels among them (views launch none)
- tensors uploaded from Python values
- waits of the host for a value

The last column shows how many more operations the target's forward pass has than in plain `generate` ({plain:,.0f} operations). Each cell
shows the count at commit {read(f"{RECORDS}/operations_before.json")["environment"]["commit"]} and the count now. One run of `python benchmarks/count_operations.py
--max_new_tokens {record["max_new_tokens"]} --json FILE` (`{RECORDS}/operations.json`, {machine(record)}; before, with 64 tokens: `operations_before.json`):

{table(["draft", *KINDS, "target's forward pass"], rows)}

Operations by purpose: drafting, building the tree and choosing its size, masks, acceptance, compaction of the cache, and the rest.

{table(["draft", *PHASES], phases)}

The cost-aware rule decides after every second level whether another one pays. The host waits for each decision.

`tests/benchmarks/test_count_operations.py` compares the counts of a tiny pair with `{RECORDS}/operations_tiny.json`."""


def compiled() -> str:
    record = read(f"{AVX2}/compiled.json")
    names = {
        "plain_compiled": "plain `generate`, static cache and `torch.compile`",
        "eager": "chain of 5",
        "compiled": "chain of 5, `draft_compile=True`",
    }
    by_set = {key: rows_of(record, key) for key in ("all", *SETS)}
    rows = [[name, *(times(found[method]["speedup"]) for found in by_set.values())] for method, name in names.items()]
    speed = {method: row["tokens_per_second"] for method, row in by_set["all"].items()}
    spent = [f"{record['compile_seconds'][method]:.0f} s" for method in ("plain_compiled", "compiled")]
    return f"""## Compiled steps

Speedups over plain eager `generate`, without the time of compiling ({spent[0]} for plain `generate`, {spent[1]} for the chain). {answers(by_set["all"]["eager"])}
answers of {record["max_new_tokens"]} tokens (`coral-hf benchmark --method plain_compiled eager:... compiled:draft_compile=true,...`; record
`{AVX2}/compiled.json`, {machine(record)}):

{table(["method", "all", *SETS.values()], rows)}

Compiled, the chain produces {times(speed["compiled"] / speed["eager"])} the tokens per second of the eager chain. Compared with plain `generate` of the same kind, it
is {times(speed["compiled"] / speed["plain_compiled"])} as fast compiled and {times(speed["eager"] / speed["plain"])} as fast eager."""


__all__ = ["compiled", "operations"]
