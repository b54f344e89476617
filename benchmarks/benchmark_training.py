"""Compares speed and memory of a training step with the reference step of `reference_training_step.py`.

    python benchmarks/benchmark_training.py --json FILE
    python benchmarks/benchmark_training.py --vocab_size 262144 --hidden_size 640 --repeats 0 --reference none

Both sides have the same random ids, drafter weights and losses (preset "hass"). Steps alternate; figures are medians. Tokens
per second count all B * S tokens. The trainer runs in the precision that it chooses for the hardware. The reference runs in
that precision ("same") and in bf16 as published, which is very slow on hardware without native bf16. Ratios are relative to
the published form, and `*_same_precision` to the other. `*_cached` compare the trainer with cached features and the reference
that runs the target; in `*_both_cached` the reference has cached features too. Peak memory is the resident set of a separate
process over one step, including libraries and target. `*_above_start` is the memory that the step added.
"""

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference_training_step import ReferenceStep
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import CoralDraftModel, demo
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.evaluation.environment import describe_environment
from coral_hf.training import CoralTrainer, CoralTrainingArguments
from coral_hf.training.report.estimate import peak_memory, reset_peak
from coral_hf.utils.hardware import native_bfloat16


@dataclass
class ScriptArguments:
    batch: int = field(default=4, metadata={"help": "B."})
    length: int = field(default=512, metadata={"help": "S of the timed steps; response tokens follow 64 others."})
    memory_length: int = field(default=1024, metadata={"help": "S of the steps whose memory is measured (0: none)."})
    steps: str = field(default="3", metadata={"help": "K."})
    repeats: int = field(default=3, metadata={"help": "Timed rounds; 0: memory only."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    reference: str = field(default="same,bf16", metadata={"help": "Precisions of the reference, or 'none'."})
    vocab_size: int | None = field(default=None, metadata={"help": "V of a random target instead of SmolLM2."})
    hidden_size: int = field(default=640, metadata={"help": "With vocab_size: H of that target."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})
    only_memory_of: str | None = field(default=None, metadata={"help": "Used by the script itself."})


class Sides:
    """Trainer and reference over one batch of random ids, from the same weights."""

    def __init__(self, script: ScriptArguments, length: int):
        torch.manual_seed(0)
        args = CoralTrainingArguments("outputs/unused", preset="hass", rollout_schedule=script.steps, report_to="none")
        self.args, self.steps = args, int(script.steps)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        if script.vocab_size is None:
            self.target = demo.load_target(self.dtype)[0]
        else:
            size, heads = script.hidden_size, script.hidden_size // 64
            config = LlamaConfig(
                vocab_size=script.vocab_size,
                hidden_size=size,
                intermediate_size=3 * size,
                num_hidden_layers=2,
                num_attention_heads=heads,
                num_key_value_heads=1,
                tie_word_embeddings=True,
            )
            self.target = LlamaForCausalLM(config).to(self.dtype)
        self.drafter = CoralDraftModel.from_target(self.target)
        ids = torch.randint(3, self.target.config.vocab_size, (script.batch, length)).tolist()
        rows = [{"prompt_ids": row[:64], "response_ids": row[64:]} for row in ids]
        self.trainer = CoralTrainer(self.drafter, self.target, args, train_dataset=rows)
        self.trainer.current_gradient_accumulation_steps = 1  # as train() would set it
        batch = self.trainer.data_collator([self.trainer.train_dataset[index] for index in range(script.batch)])
        self.batch = {name: value.to(args.device) for name, value in batch.items()}
        self.optimizer = self.trainer.create_optimizer()
        self.model = self.trainer.accelerator.prepare_model(self.drafter)  # as train() does: its forward in autocast

    def features(self) -> torch.Tensor:
        return self.trainer.adapter.compute_features(self.batch["input_ids"])

    def train(self, **features: torch.Tensor) -> None:
        self.trainer.training_step(self.model, {**self.batch, **features})
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reference(self, precision: str) -> Callable[..., float]:
        """The reference's step in `"float32"` or `"bf16"`; the target follows."""
        bf16 = precision == "bf16"
        target = self.target
        if bf16 != (self.dtype == torch.bfloat16):
            target = copy.deepcopy(target).to(torch.bfloat16 if bf16 else torch.float32)
        weights = self.args.regression_loss_weight, self.args.classification_loss_weight
        step = ReferenceStep(target, self.drafter, self.steps, bf16, *weights)
        ids, response = self.batch["input_ids"], self.batch["labels"] != -100
        return lambda **features: step.step(ids, response, **features)


def timings(script: ScriptArguments, precisions: list[str]) -> dict[str, Any]:
    """Median seconds of every form, in rounds. Forms in bf16 without native support run once, without a warm-up."""
    sides = Sides(script, script.length)
    given = {"features": sides.features()}
    forms = {"target": sides.features, "trainer": sides.train, "trainer_cached": partial(sides.train, **given)}
    once = {}
    for precision in precisions:
        step = sides.reference(precision)
        if precision == "bf16" and sides.dtype != torch.bfloat16:
            once["reference_bf16"] = step
        else:
            forms |= {f"reference_{precision}": step, f"reference_{precision}_cached": partial(step, **given)}
    seconds: dict[str, list[float]] = {}
    for round_number in range(script.repeats + 1):
        for name, form in {**forms, **(once if round_number == script.repeats else {})}.items():
            start = time.perf_counter()
            form()
            if sides.args.device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first warms up
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    record = {"seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()}}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens, ours = script.batch * script.length, "bf16" if sides.args.bf16 else "float32"
    record["tokens_per_second"] = tokens / median["trainer"]
    record["tokens_per_second_cached"] = tokens / median["trainer_cached"]
    record["tokens_per_second_reference"] = {
        name: tokens / median[f"reference_{name}"] for name in precisions if f"reference_{name}" in median
    }
    record["target_forward_share"] = median["target"] / median["trainer"]
    for precision, suffix in (("bf16", ""), (ours, "_same_precision")):
        if f"reference_{precision}" in median:
            theirs = median[f"reference_{precision}"]
            record[f"tokens_per_second_ratio{suffix}"] = theirs / median["trainer"]
            record[f"tokens_per_second_ratio_cached{suffix}"] = theirs / median["trainer_cached"]
        if f"reference_{precision}_cached" in median:
            theirs = median[f"reference_{precision}_cached"]
            record[f"tokens_per_second_ratio_both_cached{suffix}"] = theirs / median["trainer_cached"]
    return record


def memory_of(script: ScriptArguments) -> dict[str, float]:
    """Peak memory of one step in this process in GiB: absolute, and relative to before the step."""
    sides = Sides(script, script.memory_length)
    step = sides.train if script.only_memory_of == "trainer" else sides.reference(script.only_memory_of)
    device = sides.args.device
    reset_peak(device)
    before = peak_memory(device)
    step()
    peak = peak_memory(device)
    return {"peak": peak / 2**30, "above_start": (peak - before) / 2**30}


def memory(precision: str, has_reference: bool) -> dict[str, Any]:
    """Measures each side in a separate process, both in the trainer's precision."""
    found = {}
    for side in ("trainer", precision) if has_reference else ("trainer",):
        command = [sys.executable, __file__, *sys.argv[1:], "--only_memory_of", side]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[side] = json.loads(output.splitlines()[-1])
    record = {
        "peak_memory_gib": found["trainer"]["peak"],
        "peak_memory_above_start_gib": found["trainer"]["above_start"],
    }
    if has_reference:
        record["peak_memory_reference_gib"] = found[precision]["peak"]
        record["peak_memory_reference_above_start_gib"] = found[precision]["above_start"]
        record["peak_memory_ratio"] = found["trainer"]["peak"] / found[precision]["peak"]
        record["peak_memory_ratio_above_start"] = found["trainer"]["above_start"] / found[precision]["above_start"]
    return record


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    torch.set_num_threads(script.threads)
    if script.only_memory_of is not None:
        print(json.dumps(memory_of(script)))
        return
    ours = "bf16" if native_bfloat16() else "float32"
    names = [] if script.reference == "none" else script.reference.split(",")
    precisions = list(dict.fromkeys(ours if name == "same" else name for name in names))
    if set(precisions) - {"bf16", "float32"}:
        raise ValueError(f"--reference {script.reference!r}: write same, bf16, float32, several with commas, or none.")
    record: dict[str, Any] = {"B": script.batch, "S": script.length, "K": int(script.steps)}
    record |= {
        "target": "SmolLM2-135M-Instruct" if script.vocab_size is None else "random, 2 layers",
        "precision": ours,
    }
    if script.memory_length:
        record |= {"memory_S": script.memory_length, **memory(ours, bool(precisions))}
    if script.repeats:
        record |= timings(script, precisions)
    dtype = torch.bfloat16 if ours == "bf16" else torch.float32
    record["environment"] = describe_environment("cuda" if torch.cuda.is_available() else "cpu", dtype)
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
