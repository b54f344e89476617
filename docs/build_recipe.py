"""Writes examples/recipes/llama-3-8b-instruct.md from its record, and the tables of docs/training.md from the recipe.

python docs/build_recipe.py
"""

import re
from typing import Any

from measured import RECORDS, ROOT, read

from coral_hf.hub.card_tables import table
from coral_hf.training import recipe


PAGE = "examples/recipes/llama-3-8b-instruct.md"
RECORD = f"{RECORDS}/llama-3-8b-instruct_estimate.json"
SETTINGS = "docs/training.md"
_GIB = 2**30


def page() -> str:
    record = read(RECORD)
    chosen, memory, settings = record["recipe"], record["memory"], record["settings"]
    main = ("target weights", "loss", "activations", "optimizer")
    rest = memory["peak"] - sum(memory[name] for name in main)
    parts = ", ".join(f"{name} {_gib(memory[name])}" for name in main)
    layers = ", ".join(map(str, record["drafter"]["target_feature_layers"]))
    tokens, length = settings["tokens"], settings["length"]
    batch = chosen["per_device_train_batch_size"]
    deepest = chosen["rollout_schedule"].split(",")[-1].partition(":")[0]
    rows = [
        ["drafter", f"{record['drafter_parameters'] / 1e6:.0f} million parameters"],
        ["memory per GPU", f"{_gib(memory['peak'])} GiB: {parts}, the rest {_gib(rest)}"],
        [
            "the same with `--activation-checkpointing true`",
            f"{_gib(record['peak_with_activation_checkpointing'])} GiB",
        ],
        [
            "disk, one checkpoint",
            f"{_gib(record['checkpoint_bytes'])} GiB (`--save-total-limit 2` needs room for three)",
        ],
        ["disk, `--cache-features`", f"{record['feature_cache_bytes'] / _GIB:,.0f} GiB"],
        ["time, one GPU", f"{record['hours']:.1f} hours ({record['tokens_per_second']:,.0f} tokens/s)"],
        ["time, eight GPUs", f"{record['hours'] / 8:.1f} hours if they scale"],
    ]
    return f"""# A drafter for Llama-3-8B-Instruct: what to expect

`docs/build_recipe.py` writes this page from `{RECORD}`.

`paper_target.sh meta-llama/Meta-Llama-3-8B-Instruct` runs the commands. Two commands estimate their costs:

```bash
# on paper, without the target's weights
python benchmarks/estimate_training.py --target {settings["target"]} \\
    --tokens {tokens} --flops-per-second {settings["flops_per_second"]:.0e}
# measured on two real steps, with the target
coral-hf train --estimate true --target meta-llama/Meta-Llama-3-8B-Instruct --data responses.jsonl --output outputs/drafter
```

**Every figure below is an estimate** made by the first command; this training has not been run. It assumes {tokens / 1e6:.0f} million
tokens (60,000 conversations of 800 tokens), micro-batches of {batch} x {length:,} tokens, K={deepest}, and
{settings["flops_per_second"]:.0e} FLOP/s in practice per GPU (about 30 % of an H100's bf16 peak).

{table(["estimate", ""], rows)}

Settings that a training on an accelerator chooses for this target and this data ([the rule](../../docs/training.md#settings)):

{table(["setting", "value"], [[f"`{name}`", _shown(value)] for name, value in chosen.items()])}

The drafter has the shape `{record["drafter"]["shape"]}` and reads the inputs of layers {layers}.

Regenerating the responses takes additional time: `coral-hf regenerate` prints its tokens per second and the time left. If the
target and the drafter do not fit on one GPU, start several processes with `--shard-target true`. The target's decoder layers
are then split over them; embedding and head stay whole.
"""


def settings_text() -> str:
    rates = [[f"{width:,}", f"{few:g}", f"{many:g}", source] for width, few, many, source in recipe.LEARNING_RATES]
    (narrow, *_), (wide, *_) = recipe.LEARNING_RATES
    batches = [[_bound(bound, "response tokens"), str(count)] for bound, count in recipe.BATCHES]
    micro = [[_bound(bound, "wide", "up to"), str(count)] for bound, count in recipe.MICRO_BATCHES]
    epochs = [[_bound(bound, "response tokens"), f"{few:g}", f"{many:g}"] for bound, few, many in recipe.EPOCHS]
    return f"""Learning rate, by the target's hidden size and the conversations that a step takes:

{table(["hidden size", f"{recipe.FEW} per step", f"{recipe.MANY} per step", "source"], rates)}

Between {narrow:,} and {wide:,}, and between {recipe.FEW} and {recipe.MANY}, the rate is interpolated logarithmically. Outside this
range the nearest value applies. A drafter that is trained further (`--drafter`) gets {recipe.CONTINUED_SHARE:g} of it. A router or low-rank head gets
{recipe.HEAD_RATE:g} x {narrow} / hidden size.

Conversations per step, over all devices (on a CPU at most {recipe.CPU_BATCH}; ours: 8 at 0.2 million tokens, 64 at 22 million):

{table(["data", "per step"], batches)}

An accelerator computes this many of them at the same time, and a CPU {recipe.CPU_MICRO_BATCH}. The rest is accumulated:

{table(["hidden size", "at one time"], micro)}

Epochs (HASS: 40 over 68k conversations; speculators: 2 to 3 over 500k). A router or low-rank head gets one.

{table(["data", f"hidden size below {recipe.WIDE:,}", f"from {recipe.WIDE:,}"], epochs)}

Everywhere: warm-up over {recipe.WARMUP:.0%} of the steps, weight decay {recipe.WEIGHT_DECAY:g}, feature noise {recipe.FEATURE_NOISE:g}, CSRA's
weight {recipe.CSRA_WEIGHT:g}, rollout schedule `{recipe.NEW_SCHEDULE}` for a new drafter and `{recipe.CONTINUED_SCHEDULE}` for a trained one
(all the shipped drafter's), chunks of the loss of 256 rows on a CPU and of up to 2,048 on an accelerator. A new drafter has
the shape `eagle3`, reads four of the target's features, and drafts from a shortlist of a sixth of the vocabulary, in
thousands. `--preset eagle`, `hass` and `coral` set the rollout schedule and CSRA's weight of those methods, without feature
noise."""


def with_settings(text: str) -> str:
    """The page on training with its tables as they are now."""
    marks = (f"<!-- settings, written by {'docs/build_recipe.py'} -->", "<!-- end of settings -->")
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    return pattern.sub(lambda _: f"{marks[0]}\n\n{settings_text()}\n\n{marks[1]}", text)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"


def _bound(bound: int | None, unit: str, word: str = "below") -> str:
    return "more" if bound is None else f"{word} {bound:,} {unit}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page())
    (ROOT / SETTINGS).write_text(with_settings((ROOT / SETTINGS).read_text()))
