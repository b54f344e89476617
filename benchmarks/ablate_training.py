"""Measures what each part of the recipe adds: eagle, hass and coral drafters for one target, at equal data and steps.

    python benchmarks/ablate_training.py --data responses/ --eval_data dev_responses.jsonl --output_dir outputs/ablation \
        --cache_features outputs/ablation/features --learning_rate 1e-3
    python benchmarks/ablate_training.py --data responses/ --eval_data dev_responses.jsonl --output_dir outputs/ablation \
        --variants hass coral "strong:preset=coral,csra_weight=0.3"

Every training flag applies to all variants. A variant is a preset, or a name with the training arguments that it changes
and, after `config.`, the drafter's settings. Features of other layers need a separate cache:

    --variants eagle "one_layer:preset=eagle,config.target_feature_layers=[-1],cache_features=outputs/last_layer"

The rows are the first ones in a shuffled order with --response_tokens tokens in total. `seed` sets a drafter's random
weights, the order of the rows and all draws. Finished runs are in ablation.json and are not repeated. Runs with other
settings are rejected. Tau is that of a simulated greedy chain of `eval_chain_depth` on the answers in --eval_data, with the
full head.
"""

import dataclasses
import json
import random
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from coral_hf import CoralDraftModel
from coral_hf.commands.loading import load_target
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.dataset import read_rows
from coral_hf.evaluation.environment import describe_environment
from coral_hf.training import CoralTrainer, CoralTrainingArguments


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "Response files to train on."})
    eval_data: list[str] = field(metadata={"help": "Response files to measure tau on; never trained on."})
    target: str = field(default="demo", metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the target."})
    variants: list[str] = field(default_factory=lambda: ["eagle", "hass", "coral"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    response_tokens: int = field(default=200_000, metadata={"help": "Response tokens of every run."})
    min_response_tokens: int = field(default=64, metadata={"help": "Rows with shorter responses are skipped."})
    longest_row: int = field(default=320, metadata={"help": "Longer rows, in tokens, are skipped."})
    config: str = field(default='{"shape": "eagle3"}', metadata={"help": "Settings of the drafters, as JSON."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})


def parse_variant(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """`"coral"` or `"name:preset=coral,config.shape=eagle"` -> the name, its training arguments, its drafter's settings."""
    name, _, changes = text.partition(":")
    if not changes:
        return name, {"preset": name}, {}
    kinds = {item.name: item.type for item in dataclasses.fields(CoralTrainingArguments)}
    arguments, config = {}, {}
    for change in re.split(r",(?=[\w.]+=)", changes):  # a comma inside a list does not separate changes
        key, _, value = change.partition("=")
        if key.startswith("config."):
            config[key.removeprefix("config.")] = parse_value(value)
        elif key in kinds:
            arguments[key] = value if kinds[key] in (str, str | None) else parse_value(value)
        else:
            raise ValueError(f"--variants {text!r} sets {key}, which CoralTrainingArguments does not have.")
    return name, arguments, config


def parse_value(text: str) -> Any:
    """A value in JSON, or a bare word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def pick_rows(script: ScriptArguments) -> list[dict[str, Any]]:
    """Rows of the requested sizes, in an order that depends only on the files."""
    rows = read_rows(script.data)
    random.Random(0).shuffle(rows)
    picked, tokens = [], 0
    for row in rows:
        size = len(row["response_ids"])
        if size >= script.min_response_tokens and len(row["prompt_ids"]) + size <= script.longest_row:
            picked.append(row)
            tokens += size
        if tokens >= script.response_tokens:
            return picked
    raise ValueError(f"--response_tokens {script.response_tokens}: the files contain only {tokens} in matching rows.")


def check_same(record: dict[str, Any], settings: dict[str, Any], file: Path) -> None:
    """Raises `ValueError` before runs with other settings would be pooled with those on file."""
    apart = ("cache_features", "disable_tqdm", "logging_steps", "report_to")  # without an effect on the result
    for name, value in settings.items() if record["runs"] else ():
        found = record.get(name)
        if name == "training_arguments":
            found, value = ({key: one[key] for key in one if key not in apart} for one in (found or {}, value))
        if found != value:
            raise SystemExit(
                f"{file} contains runs with {name} {found}, but this run has {value}: use the same value, or another --output_dir."
            )


def main() -> None:
    script, given = parse_script(ScriptArguments, CoralTrainingArguments)
    check_output_folder(given.output_dir, "output_dir")
    if script.threads is not None:
        torch.set_num_threads(script.threads)
    defaults = CoralTrainingArguments(given.output_dir)
    names = [item.name for item in dataclasses.fields(CoralTrainingArguments) if item.init]
    common = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(defaults, name)}
    target, tokenizer = load_target(script.target, script.dtype)
    rows, eval_rows = pick_rows(script), read_rows(script.eval_data)
    file = Path(given.output_dir) / "ablation.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(file.read_text()) if file.exists() else {"runs": []}
    settings = {
        "response_tokens": sum(len(row["response_ids"]) for row in rows),
        "rows": len(rows),
        "config": json.loads(script.config),
        "training_arguments": {
            name: value for name, value in common.items() if name not in ("output_dir", "logging_dir")
        },
        "chain_depth": given.eval_chain_depth,
    }
    check_same(record, json.loads(json.dumps(settings)), file)
    record |= {**settings, "environment": describe_environment(given.device, target.dtype)}
    done = {(run["variant"], run["seed"]) for run in record["runs"]}
    for seed in script.seeds:
        for name, changes, config in map(parse_variant, script.variants):
            changed = {**changes, **({"config": config} if config else {})}
            before = [run["changes"] for run in record["runs"] if run["variant"] == name]
            if before and before[0] != changed:
                raise SystemExit(
                    f"--variants {name}: {file} contains runs of that name with {before[0]}, not {changed}: give it another name."
                )
            if (name, seed) in done:
                continue
            folder = str(file.parent / f"{name}-{seed}")
            args = CoralTrainingArguments(
                **{**common, **changes, "output_dir": folder, "overwrite_output_dir": True, "seed": seed}
            )
            set_seed(seed)
            drafter = CoralDraftModel.from_target(target, tokenizer, **{**record["config"], **config})
            trainer = CoralTrainer(drafter, target, args, rows, eval_rows, processing_class=tokenizer)
            trainer.train()
            metrics = trainer.evaluate()
            trainer.save_model()
            record["runs"].append(
                {"variant": name, "seed": seed, "changes": changed, "steps": trainer.state.global_step, **metrics}
            )
            record["acceptance_length"] = summarize(record["runs"])
            file.write_text(json.dumps(record, indent=2) + "\n")
            print(json.dumps(record["acceptance_length"]), flush=True)


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation over seeds and values of tau, by variant."""
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run["eval_acceptance_length"])
    return {
        name: {
            "mean": round(statistics.mean(values), 4),
            "stdev": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            "values": [round(value, 4) for value in values],
        }
        for name, values in found.items()
    }


if __name__ == "__main__":
    run_script(main)
