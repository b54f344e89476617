"""Compares tokens per second of `regenerate` with plain `generate` on fixed batches sorted by length.

python benchmarks/benchmark_regeneration.py --prompts prompts.jsonl --json FILE
python benchmarks/benchmark_regeneration.py --prompts prompts.jsonl --drafter demo --json FILE

Both answer the same prompts (first turns) greedily, in alternating rounds. In a round, `generate` runs batch by batch,
left-padded and sorted by prompt length. `regenerate` runs all prompts through as many slots as a batch has rows. Lengths of
prompts and responses are limited. Response tokens up to and including EOS count. `identical` is the share of equal answers
(in float32 all, except for near-ties).
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coral_hf.commands.loading import load_drafter, load_target, resolve_device
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.drafter.hub_names import hub_commit
from coral_hf.evaluation.environment import describe_environment
from coral_hf.responses.regenerate import iter_prompts, iter_responses, regenerate


REPORTED = ("acceptance_length", "plain_steps", "tokens_per_second")


@dataclass
class ScriptArguments:
    prompts: str = field(metadata={"help": "JSONL file of {'id', 'turns'} rows."})
    target: str = field(default="demo", metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of both; auto: bfloat16 where it is computed natively."}
    )
    rounds: int = field(default=1, metadata={"help": "Rounds, each with different prompts."})
    round_prompts: int = field(default=192, metadata={"help": "Prompts of a round."})
    batch_size: int = field(default=64, metadata={"help": "Rows of a batch of generate."})
    slots: int = field(default=64, metadata={"help": "Slots of regenerate."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens per response, at most."})
    max_prompt_tokens: int = field(default=256, metadata={"help": "Prompts with more tokens are skipped."})
    drafter: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of a drafter, or 'demo': adds regenerate with it, as 'drafts'."},
    )
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def run_generate(target: Any, prompts: list[list[int]], script: ScriptArguments) -> list[list[int]]:
    """Answers in the order of `prompts`, by plain `generate` on fixed batches sorted by length."""
    eos = target.generation_config.eos_token_id
    eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
    pad = target.generation_config.pad_token_id or min(eos_ids, default=0)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), script.batch_size):
        batch = order[start : start + script.batch_size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[index])) + prompts[index] for index in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        output = target.generate(
            ids.to(target.device),
            attention_mask=mask.to(target.device),
            max_new_tokens=script.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        for index, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row, start=1) if token in eos_ids), len(row))
            answers[index] = row[:end]
    return answers


def run_regenerate(
    target: Any, tokenizer: Any, rows: list[dict], script: ScriptArguments, drafter: Any = None
) -> tuple[list[list[int]], dict[str, Any]]:
    """The answers in the order of `rows`, and what `regenerate` reports."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "responses.jsonl"
        limits = {"max_new_tokens": script.max_new_tokens, "max_prompt_tokens": script.max_prompt_tokens}
        how = {"slots": script.slots, "max_turns": 1, "progress": False, **limits}
        stats = regenerate(target, tokenizer, rows, output, drafter=drafter, **how)
        found = {row["id"]: row["response_ids"] for row in iter_responses(output)}
    return [found[row["id"]] for row in rows], stats


def pick_prompts(tokenizer: Any, script: ScriptArguments) -> tuple[list[dict], list[list[int]]]:
    rows, encoded = [], []
    for row in iter_prompts(script.prompts):
        messages = [{"role": "user", "content": row["turns"][0]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) <= script.max_prompt_tokens:
            rows.append({"id": row["id"], "turns": row["turns"][:1]})
            encoded.append(list(ids))
        if len(rows) == script.rounds * script.round_prompts:
            return rows, encoded
    raise ValueError(f"{script.prompts} contains {len(rows)} prompts of at most {script.max_prompt_tokens} tokens.")


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    torch.set_num_threads(script.threads)
    target, tokenizer = load_target(script.target, script.dtype)
    rows, encoded = pick_prompts(tokenizer, script)
    times: dict[str, list[float]] = {"regenerate": [], "generate": []}
    drafter, reports = None, []
    if script.drafter is not None:
        drafter = load_drafter(script.drafter).to(device=target.device, dtype=target.dtype)
        times["drafts"] = []
    equal_drafts = 0
    cpu_seconds, tokens, identical = dict.fromkeys(times, 0.0), dict.fromkeys(times, 0), 0
    for number in range(script.rounds):
        part = slice(number * script.round_prompts, (number + 1) * script.round_prompts)
        answers = {}
        for name in sorted(times, reverse=number % 2 == 0):
            started, cpu_started = time.perf_counter(), time.process_time()
            if name == "generate":
                answers[name] = run_generate(target, encoded[part], script)
            else:
                with_drafts = drafter if name == "drafts" else None
                answers[name], report = run_regenerate(target, tokenizer, rows[part], script, with_drafts)
                reports += [report] if name == "drafts" else []
            times[name].append(time.perf_counter() - started)
            cpu_seconds[name] += time.process_time() - cpu_started
            tokens[name] += sum(map(len, answers[name]))
            print(f"round {number + 1} {name}: {times[name][-1]:.1f} s", flush=True)
        equal_drafts += sum(a == b for a, b in zip(answers.get("drafts", ()), answers["regenerate"], strict=False))
        identical += sum(a == b for a, b in zip(answers["generate"], answers["regenerate"], strict=True))
    speeds = {name: tokens[name] / sum(times[name]) for name in times}
    record = {
        "command": f"python benchmarks/benchmark_regeneration.py --prompts {os.path.basename(script.prompts)}",
        "settings": {name: value for name, value in vars(script).items() if name not in ("prompts", "json")},
        "tokens_per_second": speeds["regenerate"],
        "tokens_per_second_generate": speeds["generate"],
        "tokens_per_second_ratio": speeds["regenerate"] / speeds["generate"],
        "cpu_seconds_ratio": cpu_seconds["generate"] / cpu_seconds["regenerate"],
        "seconds": times,
        "response_tokens": tokens,
        "identical": identical / len(rows),
        "target_revision": hub_commit(target.config),
        **({} if drafter is None else {"tokens_per_second_drafts": speeds["drafts"]}),
        **({} if drafter is None else {"drafts_over_regenerate": speeds["drafts"] / speeds["regenerate"]}),
        **({} if drafter is None else {"identical_drafts": equal_drafts / len(rows)}),
        **({} if drafter is None else {"drafts": [{name: r[name] for name in REPORTED} for r in reports]}),
        "environment": describe_environment(resolve_device(None), target.dtype),
    }
    print(json.dumps(record, indent=2))
    if script.json is not None:
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
