"""The section of docs/measurements.md on batches and on long contexts."""

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
            found = _coral(record, batch_size=size)
            row.append(f"{times(found['speedup'])} ({found['acceptance_length']:.2f}, {percent(_plain_share(found))})")
        rows.append(row)
    prompts = len(next(iter(first["prompts"].values())))
    contexts = read(f"{AVX2}/contexts.json")
    lengths = [
        [f"{found['prompt_tokens']:,.0f}", times(found["speedup"]), times(found["decoding_speedup"]), f"{found['acceptance_length']:.2f}", percent(_plain_share(found))]
        for context in contexts["contexts"]
        for found in [_coral(contexts, context=context)]
    ]  # fmt: skip
    return f"""## Batches and long prompts

The shipped drafter with its default draft, compared with plain `generate` of the same batch. Each cell shows the speedup; in
parentheses, tau and the share of steps without a draft. {prompts} prompts of each benchmark, {first["max_new_tokens"]} new tokens
(`coral-hf benchmark --limit {prompts} --batch-size {" ".join(map(str, first["batch_sizes"]))} --max-new-tokens {first["max_new_tokens"]} --threads 2`; records
`{AVX2}/batches_*.json`, {machine(first)}):

{table(["batch", *by_set], rows)}

The speedup falls with the batch because a CPU without AVX-512 computes a batch at the speed of its multiplications. Where no draft pays,
the default takes steps without one.

A prompt lengthened to the given number of tokens, batch of one, {contexts["max_new_tokens"]} new tokens (`coral-hf benchmark --context
{" ".join(map(str, contexts["contexts"]))}`; record `{AVX2}/contexts.json`, {machine(contexts)}):

{table(["prompt tokens", "speedup", "speedup without the prefill", "tau", "steps without a draft"], lengths)}"""


def _plain_share(run: dict[str, Any]) -> float:
    return run["plain_steps"] / run["steps"]


def _coral(record: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    return next(
        run
        for run in record["runs"]
        if run["method"] == "coral" and all(run[key] == value for key, value in wanted.items())
    )


__all__ = ["batches"]
