"""Writes docs/measurements.md from the JSON records in the repository. No figure is typed.

python docs/build_measurements.py
"""

from statistics import mean, stdev

from batch_tables import batches, long_contexts
from measured import AVX2, OWN, RECORDS, ROOT, SETS, answers, listed, machine, percent, read, rows_of, times
from operations import compiled, operations
from readme_tables import with_tables
from rival_tables import rivals

from coral_hf.hub.card_tables import table


def step_time() -> str:
    record = read(f"{OWN}/step_time.json")
    names = {
        "coral": "shipped default (cost-aware)",
        "full_head": "the same, full head",
        "chain_of_5": "chain of 5",
        "tree_of_16": "tree of 16 (depth 6)",
    }
    parts = ("target_forward", "drafter_layer", "draft_head", "tree", "other", "step")
    rows, slower = [], []
    old = read(f"{AVX2}/step_time.json")["methods"]
    for method, name in names.items():
        spent = record["methods"][method]["milliseconds"]
        rows.append([name, *(f"{spent.get(part, 0.0):.1f}" for part in parts), percent(spent["other_share"])])
        slower.append(old[method]["milliseconds"]["step"] / spent["step"])
    shares = [100 * old[method]["milliseconds"]["other_share"] for method in names]
    count = len([prompt for ids in record["prompts"].values() for prompt in ids])
    return f"""## Where a step's time goes

Milliseconds per step of SmolLM2-135M-Instruct with its shipped drafter. The last column is the share of everything except the
target's forward pass, the drafter's layer and the draft head. It should be at most 8 %.

One run of `coral-hf benchmark --profile true --limit 2 --max-new-tokens {record["max_new_tokens"]}` on {count} prompts, two each of
{listed(list(SETS.values()))}; record `{OWN}/step_time.json` ({machine(record)}).

{table(["draft", "target forward", "drafter layer", "draft head", "tree", "other", "step", "tree and other"], rows)}

In float32 on a CPU without AVX-512 a step takes {min(slower):.1f} to {max(slower):.1f} times as long, and the last column was
{min(shares):.0f} to {max(shares):.0f} %. All records of that machine are in `{AVX2}`."""


def tree_sizes() -> str:
    tuned, record, old = read(f"{OWN}/tune.json"), read(f"{RECORDS}/tree_sizes.json"), read(f"{AVX2}/tree_sizes.json")
    target_ms, old_ms = tuned["target_ms"], read(f"{AVX2}/tune.json")["target_ms"]
    costs = listed([f"{target_ms[n - 1] / target_ms[0]:.2f}" for n in (8, 16, 32)])
    method = "cost_aware_8_3_16"
    found = {row["benchmark"]: row for row in record["rows"] if row["method"] == method}
    before = {row["benchmark"]: row for row in old["rows"] if row["method"] == method}["mean"]
    keys = ("over_best_fixed", "over_tuned", "over_eagle2")
    names = {**SETS, "mean": "mean"}
    rows = [
        [name, times(found[key]["speedup"]), *(percent(found[key][share]) for share in keys)]
        for key, name in names.items()
    ]
    turns = {name: rows_of(record, key)["plain"] for key, name in SETS.items()}
    prompts = listed([f"{answers(row)} of {name}" for name, row in turns.items()])
    predicted = read(f"{RECORDS}/predictions.json")["rows"]
    pooled = [abs(row["error"]) <= 0.1 for row in predicted if row["benchmark"] == "all"]
    single = [abs(row["error"]) <= 0.1 for row in predicted if row["benchmark"] != "all"]
    return f"""## How large a draft pays

T(n), the time of a forward pass over n tokens, differs between machines. In bf16 with AVX-512 on two threads, T(8), T(16) and
T(32) are {costs} times T(1) (`{OWN}/tune.json`, {machine(tuned)}). In float32 without AVX-512, T(8) is already
{old_ms[7] / old_ms[0]:.1f} times T(1). It grows in steps there, because `few_row_linear` works in blocks of 4 and 8 rows. A fixed size is
therefore right for one machine only.

The table compares cost-aware trees (`draft_depth=8, draft_top_k=3, draft_total_tokens=16`, calibrated by `coral-hf tune`) with
twelve fixed sizes. `benchmarks/compare_tree_sizes.py` measured {prompts} answers with {record["max_new_tokens"]} new tokens
(`{RECORDS}/tree_sizes.json`, {machine(record)}). Shares are relative to the speedup of the other size:

{table(["prompts", "speedup", "of the best fixed size", "of the best tuned tree", "of EAGLE-2's own 60 nodes"], rows)}

These are few prompts on a shared machine: differences below 5 % within a row mean little. In float32 without AVX-512, the last
row was {listed([percent(before[share]) for share in keys])}.

`benchmarks/predict_speedup.py` predicts these speedups from the times in `tune.json` and the measured acceptance. Over all prompts,
{sum(pooled)} of {len(pooled)} predictions are within 10 % of the measured speedup; by benchmark, {sum(single)} of {len(single)} are
(`{RECORDS}/predictions.json`)."""


def predictions_7b() -> str:
    rows = read(f"{RECORDS}/predictions_7b.json")["rows"]
    speedup = {(row["gpu"], row["target"], row["head"]): row["predicted_speedup"] for row in rows}
    plain: dict[str, list[float]] = {}
    for row in rows:
        plain.setdefault(row["gpu"], []).append(row["predicted_target_ms"])
    targets = dict.fromkeys(row["target"] for row in rows)
    gains = [
        f"{times(speedup['A6000', name, 'full'])} for {name} (with the router {times(speedup['A6000', name, 'router'])})"
        for name in targets
    ]
    spans = [f"{min(values):.0f} to {max(values):.0f} ms on the {gpu}" for gpu, values in plain.items()]
    return f"""What the paper's 7B targets would gain on a GPU is **predicted, not measured**. `python benchmarks/predict_from_bandwidth.py
--json FILE` computes it from bytes (record `{RECORDS}/predictions_7b.json`, where each figure names its source). It assumes:

- weights in bf16 are read at 80 % of an A6000's 768 GB/s or an H100's 3,350 GB/s
- T(n) is constant up to 64 nodes
- drafts have six levels, and 80 % of the tokens are accepted at each
- the router computes a sixteenth of the head

The predicted speedups are {listed(gains)}. They are the same on both GPUs, because the bandwidth cancels out. Plain steps take
{listed(spans)}. Kernel launches and everything around the forward passes are left out. The speedups are therefore upper bounds at
that acceptance, above all on an H100."""


def two_runs() -> str:
    record, old = read(f"{RECORDS}/two_runs.json"), read(f"{AVX2}/two_runs.json")
    difference = {row["benchmark"]: row["difference"] for row in record["rows"]}
    before = {row["benchmark"]: row["difference"] for row in old["rows"]}
    by_set = listed([f"{percent(difference[key], 1)} ({name})" for key, name in SETS.items()])
    return f"""## Two runs of one benchmark

`coral-hf benchmark --limit 8 --max-new-tokens 48 --repeats 3` ran twice on {listed(list(SETS.values()))}, and
`benchmarks/compare_runs.py` compared both runs (`{RECORDS}/two_runs.json`, {machine(record)}). The median speedup over all
answers differed by {percent(difference["all"], 1)}; by benchmark, by {by_set}. Without `--repeats`, with 16 answers per run in float32
without AVX-512, it differed by {percent(before["all"], 1)}."""


def training_step() -> str:
    record, large = read(f"{OWN}/benchmark_training.json"), read(f"{RECORDS}/training_memory_262144.json")
    old = read(f"{AVX2}/benchmark_training.json")
    rows = [
        [
            "SmolLM2-135M-Instruct (V = 49,152)",
            f"{record['tokens_per_second']:,.0f} ({record['tokens_per_second_ratio']:.2f} times the reference's)",
            f"{record['tokens_per_second_cached']:,.0f} ({record['tokens_per_second_ratio_cached']:.2f} times)",
            f"{record['peak_memory_gib']:.1f} GiB (reference {record['peak_memory_reference_gib']:.1f})",
            f"{record['peak_memory_above_start_gib']:.1f} GiB ({record['peak_memory_reference_above_start_gib']:.1f})",
        ],
        [
            "random, two layers, V = 262,144",
            "not timed",
            "not timed",
            f"{large['peak_memory_gib']:.1f} GiB",
            f"{large['peak_memory_above_start_gib']:.1f} GiB",
        ],
    ]
    return f"""## What a training step takes

`benchmarks/benchmark_training.py` measured a step of the preset `hass` with K = {record["K"]}. Speed is at {record["B"]} x {record["S"]} tokens, in turn
with a plain implementation of HASS's step (median of {len(record["seconds"]["trainer"])}). Memory is that of the process at {record["B"]} x
{record["memory_S"]} tokens.

- First row: `--reference same --repeats 7 --json FILE`, record `{OWN}/benchmark_training.json` ({machine(record)})
- Second row: `--vocab_size 262144 --hidden_size 640 --repeats 0 --reference none --json FILE`, record
  `{RECORDS}/training_memory_262144.json`

{table(["target", "tokens per second", "features from a cache", "peak memory", "memory of the step"], rows)}

The reference runs the target in both columns. If it also reads cached features, the trainer is
{record["tokens_per_second_ratio_both_cached"]:.2f} times as fast. Most of the gain comes from less memory traffic: logits are computed in chunks, the target's
head runs once for all K steps, and later steps attend in diagonal form. On a CPU without native bf16, in float32, matrix products
take nearly all of the time. The trainer was {old["tokens_per_second_ratio_same_precision"]:.2f} and {old["tokens_per_second_ratio_cached_same_precision"]:.2f} times as fast there."""


def recipes() -> str:
    record = read(f"{OWN}/ablation.json")
    taus: dict[str, list[float]] = {}
    for run in record["runs"]:
        taus.setdefault(run["variant"], []).append(run["eval_acceptance_length"])
    names = {
        "eagle": "`eagle` (one step)",
        "hass": "`hass` (three steps)",
        "coral": "`coral` (three steps and CSRA)",
    }
    rows = [
        [name, f"{mean(taus[key]):.3f} ± {stdev(taus[key]):.3f}", ", ".join(f"{tau:.3f}" for tau in taus[key])]
        for key, name in names.items()
    ]
    tried = ("weight_0.2", "temperature_0.2", "no_target_view")
    losses = {
        run["variant"]: run["eval_loss"] for run in record["runs"] if run["seed"] == 0 and run["variant"] in names
    }
    return f"""## What the recipes add

Drafters of the shipped kind were trained from random weights: {record["response_tokens"]:,} response tokens, {record["runs"][0]["steps"]} steps, learning rate
{record["training_arguments"]["learning_rate"]:g}, the exact loss, three seeds. The table shows tau of a simulated greedy chain of {record["chain_depth"]} on the answers to 80
development prompts, as mean, standard deviation and values (`benchmarks/ablate_training.py`, `{OWN}/ablation.json`,
{machine(record)}):

{table(["recipe", "tau", "seeds"], rows)}

At this length the rollout adds {mean(taus["hass"]) - mean(taus["eagle"]):.2f}. CSRA at its default weight of 0.05 adds nothing: it lowers the evaluation loss a
little with every seed (for seed 0 from {losses["hass"]:.4f} to {losses["coral"]:.4f}), but does not change tau. Other settings do not help. With
seed 0, a weight of 0.2, a temperature of 0.2, and no view of the target gave {listed([f"{taus[key][0]:.3f}" for key in tried])}, compared with
{taus["coral"][0]:.3f}. The default therefore stays small. A longer training may give a different result."""


def regeneration() -> str:
    record, drafted = read(f"{RECORDS}/regeneration.json"), read(f"{AVX2}/regeneration_every_step.json")
    measured = read(f"{AVX2}/regeneration.json")
    first = [
        plain / draft
        for plain, draft in zip(*(measured["seconds"][key] for key in ("regenerate", "drafts")), strict=True)
    ]
    sizes = record["settings"]
    last = [drafted["seconds"][key][-1] for key in ("regenerate", "drafts")]
    return f"""## What regeneration takes

`regenerate` in {sizes["slots"]} slots produces {record["tokens_per_second_ratio"]:.2f} times the tokens per second of `generate` on fixed batches of
{sizes["batch_size"]} sorted by length. {percent(record["identical"])} of the answers are equal. This was one round of {sizes["round_prompts"]} prompts with at most
{sizes["max_new_tokens"]} new tokens (`{record["command"]}`, record `{RECORDS}/regeneration.json`, {machine(record)}).

On a CPU without AVX-512, drafts do not pay in {drafted["settings"]["slots"]} slots. A draft in every step produced {times(last[0] / last[1])} the tokens per
second of the same slots without drafts, at a tau of {drafted["drafts"][-1]["acceptance_length"]:.2f} (`{AVX2}/regeneration_every_step.json`, {machine(drafted)}).
A forward pass over so many rows is bound by multiplications, which drafts add to. `regenerate --drafter` measures this and
stops drafting: {percent(measured["drafts"][0]["plain_steps"])} of the steps of a first round of {measured["settings"]["round_prompts"]} prompts had no draft, and {percent(measured["drafts"][1]["plain_steps"])} of a second one. With the
measuring, the first round ran at {times(first[0])} the speed of `regenerate` without a drafter, and the second at {times(first[1])}
(`{AVX2}/regeneration.json`, {machine(measured)})."""


def draft_heads() -> str:
    curve = read(f"{RECORDS}/router_heads.json")
    shares = sorted({row["active_share"] for row in curve["curve"]})
    uncovered = {(row["head"], row["active_share"]): row["uncovered"] for row in curve["curve"]}
    heads = {"router": "router", "list": "frequency list", "both": "half and half"}
    curves = [[name, *(percent(uncovered[key, share], 1) for share in shares)] for key, name in heads.items()]
    used = []
    for file, name in (
        ("draft_heads", "cost-aware (the full head is expensive, so it drafts less)"),
        ("draft_heads_same_tree", "the same fixed tree"),
    ):
        record = read(f"{RECORDS}/{file}.json")
        full, short = (rows_of(record)[head] for head in ("full", "shortlist"))
        ratios = [times(short[key] / full[key]) for key in ("tokens_per_second", "acceptance_length")]
        used.append([name, str(answers(full)), *ratios, record["drafter_sha256"][:8]])
    old = rows_of(read(f"{AVX2}/draft_heads.json"))
    every = {
        "shortlist": "shortlist of 8,192",
        "router": "router, 1/16 active, one choice for a level (the default)",
        "per_row": "the same, groups per row",
        "scored": "the same, scored by the router's mass",
    }
    slow = [
        [name, *(times(old[key][what] / old["full"][what]) for what in ("tokens_per_second", "acceptance_length"))]
        for key, name in every.items()
    ]
    alone = []
    for shape, name in (("gemma3", "Gemma 3, 262,144 rows"), ("smollm2", "SmolLM2, 49,152 rows")):
        for folder in (OWN, AVX2):
            record = read(f"{folder}/benchmark_head_{shape}.json")
            kind = f"{record['groups']} {record['grouping']}"
            alone.append(
                [name, record["environment"]["dtype"], kind, times(record["rows_1"], 1), times(record["rows_10"], 1)]
            )
    gemma = rows_of(read(f"{RECORDS}/large_vocabulary.json"))
    gains = {
        tree: [
            gemma[f"router{tree}"][key] / gemma[f"full{tree}"][key]
            for key in ("tokens_per_second", "acceptance_length")
        ]
        for tree in ("", "_tree")
    }
    taus = [gemma[f"{head}{tree}"]["acceptance_length"] for head in ("full", "router") for tree in ("", "_tree")]
    return f"""## Which draft head pays

A router of {curve["router_groups"]} {curve["router_grouping"]} groups was trained for an earlier version of the shipped drafter, in one pass over 200k
response tokens. The table shows the target's probability outside the active ids, on development answers, over three rollout steps
(`benchmarks/compare_heads.py`, `{RECORDS}/router_heads.json`, {machine(curve)}). The router's MLP costs as much as
{curve["router_mlp_rows"]:.0f} more rows.

{table(["active rows", *(f"1/{round(1 / share)}" for share in shares)], curves)}

On SmolLM2 in bf16 with two threads, the shortlist compares with the full head as follows. Tokens per second and tau are relative to
the full head (`coral-hf benchmark --method full:draft_head=full shortlist:draft_head=shortlist`, in the second row with
`draft_depth=5,draft_top_k=3,draft_total_tokens=12` for both; `{RECORDS}/draft_heads.json`, `draft_heads_same_tree.json`):

{table(["trees", "answers", "tokens per second", "tau", "drafter"], used)}

All heads with cost-aware trees, float32, two threads of a CPU with AVX2, {answers(old["full"])} answers
(`{AVX2}/draft_heads.json`):

{table(["head", "tokens per second", "tau"], slow)}

The shipped drafter therefore keeps the shortlist: 48 small products take a CPU about as long as one product of 8,192 rows.

The next table shows how many times faster than the full head the router is, with 1/16 of the rows active and the selection included,
on two threads (`benchmarks/benchmark_head.py`, records next to the shipped drafter's and in `{AVX2}`):

{table(["head", "dtype", "groups", "one row", "ten rows"], alone)}

A single row is bound by memory, and the rest of its time is spent on calls with cold caches. In bf16, Gemma's figure differs by
10 % between runs.

On Gemma-3-270M, `examples/large_vocabulary.py` trained a drafter and a router for some minutes. Over {answers(gemma["plain"])} answers
(`{RECORDS}/large_vocabulary.json`), the router gives {times(gains[""][0])} the full head's tokens per second in chains of 3 and
{times(gains["_tree"][0])} in trees of 12 (depth 5). Tau changes to {times(gains[""][1])} and {times(gains["_tree"][1])}. After such a short training tau is
{min(taus):.1f} to {max(taus):.1f}, and drafting is slower than plain decoding with any head."""


def shapes() -> str:
    taus = {run["variant"]: run["eval_acceptance_length"] for run in read(f"{RECORDS}/shapes.json")["runs"]}
    return f"""## Which shape trains better

Trained from random weights with K = 1 on 200k response tokens and one seed (`{RECORDS}/shapes.json`), tau is {taus["eagle_shape"]:.3f} in the
`eagle` shape, {taus["one_feature"]:.3f} in `eagle3` with the last feature, and {taus["three_features"]:.3f} with EAGLE-3's three features. The
differences are small, so the default is the shape that every engine serves."""


def page() -> str:
    sections = (
        step_time, operations, compiled, batches, long_contexts, tree_sizes, predictions_7b, two_runs, training_step, recipes, shapes, regeneration, draft_heads, rivals,
    )  # fmt: skip
    head = """# Measurements

`python docs/build_measurements.py` writes this page from the records it names, and a test compares both. Speeds are ratios
measured side by side in one process. Tau is the number of tokens per forward pass of the target, including the bonus token."""
    return "\n\n".join([head, *(section() for section in sections)]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "measurements.md").write_text(page())
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
