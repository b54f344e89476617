"""The sections of docs/measurements.md on batches and long contexts."""

from typing import Any

from measured import AVX2, SETS, machine, percent, read, times

from coral_hf.hub.card_tables import table


def batches() -> str:
    by_set = {name: read(f"{AVX2}/batches_{key}.json") for key, name in SETS.items()}
    first = next(iter(by_set.values()))
    rows = []
    for size in first["batch_sizes"]:
        row = [str(size)]
        for record in by_set.values():
            found = coral_row(record, batch_size=size)
            row.append(f"{times(found['speedup'])} ({found['acceptance_length']:.2f}, {percent(_plain_share(found))})")
        rows.append(row)
    prompts = len(next(iter(first["prompts"].values())))
    return f"""## Batches

The shipped drafter with its default draft, compared with plain `generate` of the same batch. Each cell shows the speedup; in
parentheses, tau and the share of steps without a draft. {prompts} prompts of each benchmark, {first["max_new_tokens"]} new tokens
(`coral-hf benchmark --limit {prompts} --batch-size {" ".join(map(str, first["batch_sizes"]))} --max-new-tokens {first["max_new_tokens"]} --threads 2`; records
`{AVX2}/batches_*.json`, {machine(first)}):

{table(["batch", *by_set], rows)}

The speedup falls with the batch because a CPU without AVX-512 computes a batch at the speed of its multiplications. Where no draft pays,
the default takes steps without one."""


def long_contexts() -> str:
    record, profile = read(f"{AVX2}/contexts.json"), read(f"{AVX2}/long_context.json")
    summaries, verify = read(f"{AVX2}/long_summaries.json"), read(f"{AVX2}/verify_times.json")
    rows = []
    for context in record["contexts"]:
        found = coral_row(record, context=context)
        speedups = (times(found[key]) for key in ("speedup", "decoding_speedup"))
        rows.append([f"{found['prompt_tokens']:,.0f}", *speedups, f"{found['acceptance_length']:.2f}"])
    summary = coral_row(summaries, context=None)
    short, long = (verify["contexts"][length] for length in ("200", "3000"))
    one, eight = [f"{nodes['chain_8']['ms'] / nodes['chain_1']['ms']:.2f}" for nodes in (short, long)]
    tree = f"{long['tree_8']['ms'] / long['chain_1']['ms']:.2f}"
    return f"""## Long contexts

Prompts lengthened to the given number of tokens, batch of one, {record["max_new_tokens"]} new tokens (`coral-hf benchmark --context
{" ".join(map(str, record["contexts"]))}`; record `{AVX2}/contexts.json`, {machine(record)}):

{table(["prompt tokens", "speedup", "speedup without the prefill", "tau"], rows)}

The prefill takes most of the time of a short answer to a long prompt, and drafting does not shorten it. For {summary["n_rows"]} summaries of
texts of {summary["prompt_tokens"]:,.0f} tokens with {summaries["max_new_tokens"]} new tokens, the speedup is {times(summary["speedup"])}, and {times(summary["decoding_speedup"])} without the prefill
(`{AVX2}/long_summaries.json`).

After {profile["context"][0]:,} tokens, {percent(profile["milliseconds"]["default"]["other_share"], 1)} of a step is spent outside the target's forward pass, the drafter's layer and the draft
head. The peak memory of a prefill is {times(profile["peak_ratio"])} plain `generate`'s (`benchmarks/measure_long_context.py`, record
`{AVX2}/long_context.json`).

The target's forward pass over 8 nodes takes {one} times as long as over one node after 200 tokens. After 3,000 tokens it takes {eight} times
as long for a chain and {tree} times for a tree (`benchmarks/benchmark_verify.py --contexts 200,3000`, record
`{AVX2}/verify_times.json`)."""


def _plain_share(run: dict[str, Any]) -> float:
    return run["plain_steps"] / run["steps"]


def coral_row(record: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """A batch record's row of the drafter with these values."""
    return next(
        run
        for run in record["runs"]
        if run["method"] == "coral" and all(run[key] == value for key, value in wanted.items())
    )


__all__ = ["batches", "coral_row", "long_contexts"]
