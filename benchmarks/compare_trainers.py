"""EAGLE-3's training step of three trainers, on one batch: tokens per second and peak memory.

    python benchmarks/compare_trainers.py --speculators PYTHON --specforge PYTHON --json FILE

PYTHON is an interpreter with that package: `pip install torch==2.13.0`, then the package with --no-deps and what importing it asks
for. Each trainer runs in a process of its own, one after the other, on the CPU in float32: K steps of the rollout over the same
tokens, with the same features of the same target, stored as from a cache. All train one layer of the target's sizes and use the
target's head over its whole vocabulary. What a trainer does differently remains its own: CORAL detaches what a step feeds back,
the others do not; SpecForge computes acceptance rates over the vocabulary in each step. `changed` says what was needed for a CPU,
`published` where the code of the package stops on one when nothing is changed.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from coral_hf.commands.loading import DEMO, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.conversion.eagle_config import default_feature_layers
from coral_hf.drafter.target_adapter import TargetAdapter
from coral_hf.evaluation.environment import describe_environment, describe_target


WORKER = Path(__file__).parent / "rivals" / "trainers" / "measure_step.py"


@dataclass
class ScriptArguments:
    speculators: str | None = field(default=None, metadata={"help": "Python with speculators."})
    specforge: str | None = field(default=None, metadata={"help": "Python with SpecForge."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of a Llama, or 'demo'."})
    batch: int = field(default=1, metadata={"help": "B: conversations."})
    length: int = field(default=1024, metadata={"help": "S: tokens of each."})
    prompt: int = field(default=64, metadata={"help": "Tokens of each that are not trained on."})
    steps: int = field(default=3, metadata={"help": "K: rollout steps."})
    repeats: int = field(default=5, metadata={"help": "Timed steps."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    wall: bool = field(default=True, metadata={"help": "Also record times by the clock; not beside other work."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def write_batch(target: Any, folder: Path, settings: dict[str, Any]) -> None:
    """Writes target, features and settings for the workers.

    Args:
        target (`PreTrainedModel`): a Llama, in float32.
        folder (`Path`): gets `target/`, `batch.safetensors` and `settings.json`.
        settings (`dict`): `batch`, `length`, `prompt` and what else the workers read.
    """
    path = folder / "target"
    target.save_pretrained(path, max_shard_size="100GB")
    weights = "model.safetensors"
    with safe_open(path / weights, framework="pt") as stored:
        names = list(stored.keys())
    (path / f"{weights}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, weights)})
    )
    embedding = "model.embed_tokens.weight"
    keys = {"embedding_key": embedding, "head_key": "lm_head.weight" if "lm_head.weight" in names else embedding}
    layers = default_feature_layers(target.config.num_hidden_layers)
    (folder / "settings.json").write_text(json.dumps({**settings, **keys, "layers": layers}))
    ids = torch.randint(3, target.config.vocab_size, (settings["batch"], settings["length"]))
    before_norm: list[torch.Tensor] = []
    hook = target.get_decoder().norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0].detach()))
    features = TargetAdapter(target, [*layers, -1]).compute_features(ids)
    hook.remove()
    loss_mask = torch.ones_like(ids)
    loss_mask[:, : settings["prompt"]] = 0
    size = target.config.hidden_size
    batch = {
        "input_ids": ids,
        "loss_mask": loss_mask,
        "features": features[..., :-size],  # [B, S, 3H]
        "last": features[..., -size:],  # [B, S, H], after the final norm
        "last_before_norm": before_norm[0],
    }
    save_file({name: value.contiguous() for name, value in batch.items()}, folder / "batch.safetensors")


def run_worker(python: str, name: str, folder: Path, threads: int, *how: str) -> dict[str, Any]:
    """What a worker printed last.

    Raises:
        OSError: if it failed; with its last line on stderr.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if python != sys.executable:  # another environment: nothing of this one
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(WORKER), name, str(folder), *how], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{name}'s step failed in {python}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def trainer_row(found: dict[str, Any], tokens: int, wall: bool) -> dict[str, Any]:
    """A worker's answer as the record has it: medians as tokens per second."""
    seconds = {"tokens_per_cpu_second": found.pop("cpu_seconds"), "tokens_per_second": found.pop("seconds")}
    if not wall:
        del seconds["tokens_per_second"]
    return {**found, **{key: round(tokens / statistics.median(values), 1) for key, values in seconds.items()}}


def main() -> None:
    (args,) = parse_script(ScriptArguments)
    if args.json is not None:
        check_output_file(args.json)
    if not 0 < args.prompt < args.length:
        raise ValueError(f"--prompt {args.prompt} must be at least 1 and less than --length {args.length}.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    target: AutoModelForCausalLM = load_target(args.target, "float32", "cpu")[0]
    if target.config.model_type != "llama":
        raise ValueError(
            f"--target {args.target} is a {target.config.model_type}; all three trainers are run for a Llama."
        )
    pythons = {"coral": sys.executable, "speculators": args.speculators, "specforge": args.specforge}
    sizes = {name: getattr(args, name) for name in ("batch", "length", "prompt", "steps", "repeats", "threads")}
    rows = {}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_batch(target, folder, {**sizes, "learning_rate": 1e-4})
        record = {**describe_target(target), "layers": json.loads((folder / "settings.json").read_text())["layers"]}
        del target
        for name, python in pythons.items():
            if python is None:
                continue
            found = run_worker(python, name, folder, args.threads)
            rows[name] = trainer_row(found, args.batch * args.length, args.wall)
            if name != "coral":
                rows[name]["published"] = run_worker(python, name, folder, args.threads, "published")
            print(name, json.dumps(rows[name], indent=1))
    record = {"environment": describe_environment("cpu", torch.float32), **record, **sizes, "trainers": rows}
    if args.json is not None:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
