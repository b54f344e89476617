"""A small but real setting in which drafters train in a minute: every part of the method, at equal data, over several seeds.

    python benchmarks/method_lab.py --output outputs/lab
    python benchmarks/method_lab.py --output outputs/lab --recipes eagle hass3 lk_hybrid --seeds 0 1 2 3 4
    python benchmarks/method_lab.py --output outputs/lab --text responses.jsonl --text_tokenizer demo --minutes 60

The script trains a byte-level BPE vocabulary and a Llama of a few million parameters on text (--text; by default the
repository's documents and code). This target continues the beginnings of documents, greedily and at temperature 1. One-layer
drafters are then trained on these answers with CoralTrainer. Vocabulary, target and answers are kept in the folder.

For each (recipe, seed), the record contains tau of simulated chains of five on held-out answers at temperature 0 and 1; for each
depth, the overlap of both distributions and how often their best tokens agree; tau of trees of 16 in `generate`; and a learning
curve. Finished pairs are in method_lab.json and are not repeated. A record with other settings is rejected. Seeds are the outer
loop, so that a run that ends early (--minutes) has all recipes for fewer seeds. A seed sets a drafter's first weights, the order
of the rows and all draws; data and target stay the same.
"""

import json
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lab.measuring import chains, trees
from lab.optimizers import MuonWithAdamW
from lab.recipes import RECIPES, Recipe, chosen
from lab.summary import draw, summarize, table
from lab.world import World, WorldSettings, make_world
from transformers import set_seed

from coral_hf import CoralDraftModel
from coral_hf.commands.loading import load_target
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.evaluation.environment import describe_environment
from coral_hf.training import CoralTrainer, CoralTrainingArguments
from coral_hf.training.recipe import drafter_settings


CHAIN_DEPTH = 5
_CURVE_POINTS = 6
_WORLD = {item.name: item.default for item in fields(WorldSettings)}


@dataclass
class ScriptArguments:
    output: str = field(metadata={"help": "Folder for the world, the record and the plot."})
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of text, prompts or responses (default: the repository's documents and code)."},
    )
    text_tokenizer: str | None = field(
        default=None, metadata={"help": "Model whose tokenizer made the ids in --text: path, Hub id or 'demo'."}
    )
    text_rows: str = field(default="", metadata={"help": "Only rows of --text whose id begins with this."})
    recipes: list[str] = field(default_factory=lambda: list(RECIPES), metadata={"help": "Recipes to compare."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW."})
    muon_rate: float = field(default=0.01, metadata={"help": "Learning rate of Muon, in the recipe muon."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the training answers."})
    batch_size: int = field(default=8, metadata={"help": "Answers per step."})
    tree_prompts: int = field(
        default=32, metadata={"help": "Prompts per temperature for which trees are drafted (0: none)."}
    )
    measured_rows: int | None = field(
        default=None,
        metadata={"help": "Held-out answers per temperature for measuring drafters (default: all)."},
    )
    curve_rows: int = field(default=32, metadata={"help": "Held-out answers for the learning curve."})
    vocab_size: int = field(default=_WORLD["vocab_size"], metadata={"help": "The target's vocabulary size."})
    hidden_size: int = field(default=_WORLD["hidden_size"], metadata={"help": "The target's hidden size."})
    num_layers: int = field(default=_WORLD["num_layers"], metadata={"help": "The target's number of layers."})
    target_tokens: int = field(default=_WORLD["target_tokens"], metadata={"help": "Tokens to train the target on."})
    target_rate: float = field(default=_WORLD["target_rate"], metadata={"help": "AdamW's rate for the target."})
    prompt_tokens: int = field(default=_WORLD["prompt_tokens"], metadata={"help": "Tokens of each prompt."})
    answer_tokens: int = field(default=_WORLD["answer_tokens"], metadata={"help": "Most tokens of an answer."})
    answers: int = field(default=_WORLD["answers"], metadata={"help": "Training answers per temperature."})
    held_out_answers: int = field(
        default=_WORLD["held_out_answers"], metadata={"help": "Held-out answers per temperature."}
    )
    minutes: float | None = field(default=None, metadata={"help": "Start no new run after this time."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})


def drafter_config(target: Any, recipe: Recipe) -> dict[str, Any]:
    """Settings of a recipe's drafter: those of a new drafter with the recipe's changes. A width is a share of the target's."""
    config = {**drafter_settings(target.config), **recipe.config}
    if "intermediate_size" in recipe.config:
        config["intermediate_size"] = int(recipe.config["intermediate_size"] * target.config.intermediate_size)
    return config


def train_and_measure(world: World, recipe: Recipe, seed: int, script: ScriptArguments) -> dict[str, Any]:
    """Trains and measures a drafter."""
    steps = -(-len(world.rows["train"]) // script.batch_size) * script.epochs
    args = CoralTrainingArguments(
        output_dir=str(Path(script.output) / "run"),
        overwrite_output_dir=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_curve=False,
        seed=seed,
        learning_rate=script.learning_rate,
        num_train_epochs=script.epochs,
        per_device_train_batch_size=script.batch_size,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=max(1, int(steps / _CURVE_POINTS)),
        logging_steps=10**9,
        eval_chain_depth=CHAIN_DEPTH,
        **recipe.arguments,
    )
    set_seed(seed)
    drafter = CoralDraftModel.from_target(world.target, world.tokenizer, **drafter_config(world.target, recipe))
    optimizer = None
    if recipe.optimizer == "muon":
        optimizer = MuonWithAdamW(
            drafter.named_parameters(), script.muon_rate, script.learning_rate, weight_decay=args.weight_decay
        )
    held_out = world.rows["temperature_0"][: script.curve_rows]
    trainer = CoralTrainer(drafter, world.target, args, world.rows["train"], held_out, optimizers=(optimizer, None))
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    curve = [
        {"response_tokens": entry["eval_response_tokens_seen"], "tau": round(entry["eval_acceptance_length"], 4)}
        for entry in trainer.state.log_history
        if "eval_acceptance_length" in entry
    ]
    found: dict[str, Any] = {"steps": trainer.state.global_step, "response_tokens": trainer.tokens_seen}
    for temperature in (0.0, 1.0):
        name = f"temperature_{temperature:g}"
        rows = world.rows[name][: script.measured_rows]
        found[name] = chains(trainer, rows, temperature, CHAIN_DEPTH)
        if script.tree_prompts:
            found[name]["tree_tau"] = trees(
                trainer, world.target, rows[: script.tree_prompts], temperature, script.answer_tokens
            )
    return {**found, "cpu_seconds": round(seconds), "curve": curve}


def open_record(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record so far.

    Raises:
        ValueError: if it has runs of other settings.
    """
    record = json.loads(file.read_text()) if file.exists() else {"runs": []}
    if record["runs"] and record["settings"] != settings:
        raise ValueError(
            f"{file} has runs with {record['settings']}, but this run has {settings}: use the same, or another --output."
        )
    return {**record, "settings": settings}


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_folder(script.output, "output")
    recipes = chosen(script.recipes)
    if script.threads is not None:
        torch.set_num_threads(script.threads)
    start, folder = time.monotonic(), Path(script.output)

    def text_tokenizer() -> Any:
        return load_target(script.text_tokenizer, "auto")[1] if script.text_tokenizer else None

    asked = WorldSettings(**{name: getattr(script, name) for name in _WORLD if hasattr(script, name)})
    world = make_world(folder, asked, script.text, text_tokenizer, script.text_rows)
    file = folder / "method_lab.json"
    names = ("learning_rate", "muon_rate", "epochs", "batch_size", "tree_prompts", "measured_rows", "curve_rows")
    settings = {
        **{name: getattr(script, name) for name in names},
        "world": json.loads((folder / "world.json").read_text()),
        "training_rows": len(world.rows["train"]),
        "chain_depth": CHAIN_DEPTH,
    }
    record = open_record(file, settings)
    record |= {"target": world.facts, "environment": describe_environment("cpu", torch.float32)}
    done = {(run["recipe"], run["seed"]): run["changes"] for run in record["runs"]}
    for (name, _), changes in done.items():
        if name in recipes and changes != recipes[name].to_dict():
            raise ValueError(f"{file} has runs of {name} with {changes}: give another --output.")
    for seed in script.seeds:
        for name, recipe in recipes.items():
            if (name, seed) in done:
                continue
            if script.minutes is not None and time.monotonic() - start > 60 * script.minutes:
                break
            found = train_and_measure(world, recipe, seed, script)
            record["runs"].append({"recipe": name, "seed": seed, "changes": recipe.to_dict(), **found})
            record["summary"] = summarize(record["runs"])
            file.write_text(json.dumps(record, indent=2) + "\n")
            print(f"{name}, seed {seed}: {json.dumps(found['temperature_0'])}", flush=True)
    if record["runs"]:
        print(table(record["summary"]))
        draw(record, folder / "method_lab.png")


if __name__ == "__main__":
    run_script(main)
