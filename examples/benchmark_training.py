"""Tokens per second and peak memory of a training step on SmolLM2.

    python examples/benchmark_training.py --json FILE

One process, random token ids, B=4, S=512, K=3 by default, features computed online and then given (as from a cache).
`logits_gib` is what the drafter's fp32 logits of all K steps would take; they are computed chunk by chunk instead.
"""

import json
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from coral_hf import CoralDraftModel, demo
from coral_hf.evaluation.environment import describe_environment
from coral_hf.training import CoralTrainer, CoralTrainingArguments


@dataclass
class ScriptArguments:
    batch: int = field(default=4, metadata={"help": "B."})
    length: int = field(default=512, metadata={"help": "S; all but the first 64 tokens are response tokens."})
    steps: str = field(default="3", metadata={"help": "K."})
    repeats: int = field(default=3, metadata={"help": "Timed steps; the median counts."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def main() -> None:
    script = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(script.threads)
    torch.manual_seed(0)
    target, tokenizer = demo.load_target()
    rows = [
        {"prompt_ids": ids[:64], "response_ids": ids[64:]}
        for ids in torch.randint(3, target.config.vocab_size, (script.batch, script.length)).tolist()
    ]
    args = CoralTrainingArguments(output_dir="outputs/unused", rollout_schedule=script.steps, report_to="none")
    drafter = CoralDraftModel.from_target(target, tokenizer)
    trainer = CoralTrainer(model=drafter, target_model=target, args=args, train_dataset=rows)
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    optimizer = trainer.create_optimizer()
    before_gib = _peak_gib()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(script.batch)])
    batch = {name: value.to(args.device) for name, value in batch.items()}
    record = {"B": script.batch, "S": script.length, "K": int(script.steps)}
    for name in ("online", "cached"):
        if name == "cached":
            batch["features"] = trainer.adapter.compute_features(batch["input_ids"])
        seconds = []
        for repeat in range(script.repeats + 1):
            start = time.perf_counter()
            trainer.training_step(drafter, dict(batch))
            optimizer.step()
            optimizer.zero_grad()
            if repeat:  # the first warms up
                seconds.append(time.perf_counter() - start)
        record[f"tokens_per_second_{name}"] = script.batch * script.length / statistics.median(seconds)
    record["peak_memory_gib"] = _peak_gib()
    record["peak_memory_before_steps_gib"] = before_gib
    record["logits_gib"] = int(script.steps) * script.batch * script.length * target.config.vocab_size * 4 / 2**30
    record["environment"] = describe_environment(args.device, torch.bfloat16)
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
