"""Measurements for ten minutes on a GPU, with a JSON file for each part. `scripts/gpu_check.sh` runs all parts.

    python benchmarks/gpu_check.py --part steps --model llama-3-8b --output outputs/gpu_check --minutes 5
    python benchmarks/gpu_check.py --part steps --model demo --output outputs/gpu_check
    python benchmarks/gpu_check.py --part tests --output outputs/gpu_check

`steps`: milliseconds per step of plain `generate`, a chain of 5, a tree of 16 and a tree of 60, eager and compiled, with the
full head and with a router's groups, for batches of 1, 4 and 16. Each cell has a file, and the most important cells come
first. Llama-3-8B has random weights in its published shapes, created on the device, because the time of a step does not depend
on the weights. The acceptance is set: every level of a draft is accepted with probability `--share`. The generated text is
meaningless. Cells with a file are not measured again, and no cell starts after `--minutes`.

`tests`: `pytest -m gpu` and its results.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

from coral_hf import CoralDraftModel, demo
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.evaluation.compiling import compile_settings, timed_apart
from coral_hf.evaluation.environment import describe_environment
from coral_hf.evaluation.methods import timed
from coral_hf.training.report.estimate import peak_memory, reset_peak


ROOT = Path(__file__).parents[1]
SHAPES = {"llama-3-8b": ROOT / "examples" / "recipes" / "llama-3-8b-instruct.config.json"}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GROUPS, ACTIVE = 32, 4  # of the router, which is not trained
SIZES = {
    "chain_5": {"draft_depth": 5, "draft_top_k": 1, "draft_total_tokens": 6},
    "tree_16": {"draft_depth": 4, "draft_top_k": 4, "draft_total_tokens": 16},
    "tree_60": {"draft_depth": 6, "draft_top_k": 10, "draft_total_tokens": 60},
}


@dataclass
class Arguments:
    part: str = field(metadata={"help": "steps or tests."})
    output: str = field(metadata={"help": "Folder of the JSON files."})
    model: str = field(default="llama-3-8b", metadata={"help": f"Of the steps: demo, {', '.join(SHAPES)}."})
    minutes: float = field(default=10.0, metadata={"help": "No cell starts after this many."})
    share: float = field(default=0.6, metadata={"help": "Probability that a level of a draft is accepted."})
    context: int = field(default=128, metadata={"help": "Tokens of each prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens generated in each cell."})
    small: bool = field(
        default=False, metadata={"help": "Tiny shapes, few cells, graphs traced only: tries the script itself."}
    )


@contextmanager
def accepting(share: float, seed: int = 0) -> Iterator[None]:
    """Context in which the first child of each node is accepted with this probability, regardless of the target.

    The host still reads the same values as normally: tokens, parents and the target's choices, in one transfer.
    """
    chance = random.Random(seed)

    def accept(tree: Any, choices: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        tokens, tree.known_parents, chosen = torch.stack([tree.tokens, tree.parents, choices]).tolist()
        paths, found = [], []
        for row, parents in enumerate(tree.known_parents):
            path = [0]
            while path[-1] in parents and chance.random() < share:
                path.append(parents.index(path[-1]))
            paths.append(path)
            found.append([*(tokens[row][node] for node in path[1:]), chosen[row][path[-1]]])
        return paths, found

    with patch("coral_hf.generation.tokens.token_choice.accept_greedy", accept):
        yield


def models(arguments: Arguments, device: str) -> tuple[Any, Any]:
    """Target and drafter, the drafter with a router."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if arguments.model == "demo":
        target, drafter = demo.load_target(dtype)[0].to(device), demo.load_drafter(dtype)
    elif arguments.model in SHAPES:
        sizes = json.loads(SHAPES[arguments.model].read_text())
        if arguments.small:
            sizes |= SMALL
        torch.manual_seed(0)
        with torch.device(device):
            target = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)
        drafter = CoralDraftModel.from_target(target)
    else:
        raise ValueError(f"--model {arguments.model!r} is unknown; choose demo, {', '.join(SHAPES)}.")
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    drafter.add_router(GROUPS, ACTIVE)
    return target.eval(), drafter.to(device=device, dtype=dtype).eval()


def cells(small: bool) -> Iterator[dict[str, Any]]:
    """The cells to measure, the most important first."""
    for batch in (1,) if small else (1, 4, 16):
        yield {"method": "plain", "batch": batch, "compiled": False}
        yield {"method": "plain", "batch": batch, "compiled": True}
        for head in ("full", "router"):
            for method in ("tree_16",) if small else ("tree_16", "chain_5", "tree_60"):
                for compiled in (False, True):
                    yield {"method": method, "batch": batch, "compiled": compiled, "head": head}


def settings_of(cell: dict[str, Any], small: bool) -> dict[str, Any]:
    """A cell's settings in the generation config."""
    if cell["method"] == "plain":
        return {"cache_implementation": "static"} if cell["compiled"] else {}
    settings = {**SIZES[cell["method"]], "draft_head": cell["head"], "draft_compile": cell["compiled"]}
    if small and cell["compiled"]:
        settings["compile_config"] = CompileConfig(backend="eager", fullgraph=True)
    return settings


def measured(target: Any, drafter: Any, cell: dict[str, Any], arguments: Arguments, prefill: float) -> dict[str, Any]:
    """A cell with its figures."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = target.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (cell["batch"], arguments.context), generator=generator)
    drafts = cell["method"] != "plain"
    settings, count = settings_of(cell, arguments.small), arguments.max_new_tokens

    def answer() -> tuple[torch.Tensor, float]:
        with accepting(arguments.share):
            return timed(target, ids, torch.ones_like(ids), count, drafter if drafts else None, 0.0, settings)

    if not compile_settings(settings, "cpu") and not settings.get("draft_compile"):
        answer()  # the first call of a method is not measured
    reset_peak(target.device)
    _, seconds, compiling = timed_apart(answer)
    steps, tau = count - 1, 1.0
    if drafts:
        steps, tau = max(row.steps for row in drafter.last_stats.rows), drafter.last_stats.acceptance_length
    return {
        **cell,
        "forwards": steps,
        "tokens_per_step": tau,
        "ms_per_step": 1000 * (seconds - prefill) / steps,
        "ms_per_token": 1000 * (seconds - prefill) / (count - 1),
        "compile_seconds": compiling,
        "peak_memory_gib": peak_memory(target.device) / 2**30,
    }


def measure_steps(arguments: Arguments, device: str) -> None:
    """Writes a file for each cell that has none yet."""
    began, folder = time.monotonic(), Path(arguments.output)
    names = {}
    for cell in cells(arguments.small):
        kind = "compiled" if cell["compiled"] else "eager"
        name = "_".join(["steps", arguments.model, f"b{cell['batch']}", cell["method"], kind, cell.get("head", "")])
        names[folder / f"{name.rstrip('_')}.json"] = cell
    missing = {path: cell for path, cell in names.items() if not path.exists()}
    if not missing:
        print(f"{arguments.model}: all {len(names)} cells are measured")
        return
    target, drafter = models(arguments, device)
    environment = describe_environment(target.device, target.dtype)
    prefills: dict[int, float] = {}
    for path, cell in missing.items():
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"{arguments.model}: {arguments.minutes:g} minutes are over; run it again for the remaining cells")
            return
        batch = cell["batch"]
        if batch not in prefills:
            ids = torch.full((batch, arguments.context), 5)
            for _ in range(2):
                prefills[batch] = timed(target, ids, torch.ones_like(ids), 1, None, 0.0, {})[1]
        found = measured(target, drafter, cell, arguments, prefills[batch])
        found |= {"model": arguments.model, "share": arguments.share, "context": arguments.context}
        _write(path, {**found, "max_new_tokens": arguments.max_new_tokens, "environment": environment})
        print(f"{path.stem}: {found['ms_per_step']:.2f} ms a step, {found['ms_per_token']:.2f} ms a token", flush=True)


def run_tests(arguments: Arguments, device: str) -> int:
    """Runs the tests that need a GPU, and writes their results."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0", str(ROOT / "tests" / "test_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    print("\n".join(lines[-30:]))
    record = {"status": done.returncode, "summary": lines[-1] if lines else "", "seconds": time.monotonic() - began}
    record["failed"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    _write(Path(arguments.output) / "tests.json", {**record, "environment": describe_environment(device, dtype)})
    return done.returncode


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def main() -> int:
    (arguments,) = parse_script(Arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.part == "tests":
        return run_tests(arguments, device)
    if arguments.part != "steps":
        raise ValueError(f"--part {arguments.part!r} is unknown; choose steps or tests.")
    backend = partial(CompileConfig, backend="eager") if arguments.small else CompileConfig
    with patch("coral_hf.evaluation.compiling.CompileConfig", backend):
        measure_steps(arguments, device)
    return 0


if __name__ == "__main__":
    run_script(main)
