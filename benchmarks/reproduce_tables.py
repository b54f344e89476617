"""Prints the paper's tables in miniature: speedup and tau of eagle, hass, coral and coral + router drafters for one target.

    python benchmarks/reproduce_tables.py --data mt_bench.jsonl humaneval.jsonl gsm8k.jsonl \
        --responses responses/ --output outputs/tables          # trains what is not in outputs/tables yet
    python benchmarks/reproduce_tables.py --data ... --output outputs/tables --drafters eagle=org/a coral=outputs/b

All drafters see the same rows, steps and loss weights. MT-bench, HumanEval and GSM8K, temperature 0 and 1, interleaved
prompt by prompt with plain decoding. The paper's targets and hardware are different, so its range is printed separately.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from coral_hf.cli import main as coral_hf
from coral_hf.commands.loading import DEMO, load_drafter, load_target, resolve_device, resolve_dtype
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import read_prompts
from coral_hf.evaluation.benchmark import run_benchmark
from coral_hf.evaluation.methods import parse_methods


PAPER = (
    "CORAL, Weng et al., ACL 2025: 2.50x-4.07x over plain decoding (Llama-2-7B-chat, Llama-3-8B-instruct, "
    "Qwen2.5-7B-instruct on an A6000)"
)
PRESETS = ("eagle", "hass", "coral")
ROUTED = "coral+router"


@dataclass
class Arguments:
    data: list[str] = field(metadata={"help": "Prompt files, MT-bench, HumanEval and GSM8K."})
    output: str = field(metadata={"help": "Folder of the drafters trained here, and of benchmark.json."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    responses: list[str] = field(default_factory=list, metadata={"help": "Response files to train on."})
    drafters: list[str] = field(default_factory=list, metadata={"help": "NAME=FOLDER of drafters trained elsewhere."})
    router_groups: int = field(default=64, metadata={"help": "Groups of the router."})
    shortlist_size: int = field(default=8192, metadata={"help": "Ids of the routed drafter's shortlist."})
    max_steps: int = field(default=1000, metadata={"help": "Training steps of each drafter."})
    learning_rate: float = 1e-3
    shape: str = "eagle3"
    limit: int = field(default=10, metadata={"help": "Prompts per file."})
    max_new_tokens: int = 64
    temperature: list[float] = field(default_factory=lambda: [0.0, 1.0])
    method: str = field(default="coral", metadata={"help": "How they draft, see coral-hf benchmark --method."})
    dtype: str = field(default="auto", metadata={"help": "auto: bfloat16 where it is computed natively."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    threads: int | None = None


def drafter_folders(arguments: Arguments) -> dict[str, str]:
    """Drafters by name: given ones, ones trained earlier, and others, which are trained now."""
    folders = dict(text.split("=", 1) for text in arguments.drafters)
    if folders:
        return folders
    for name in (*PRESETS, ROUTED):
        folder = Path(arguments.output) / name
        if not (folder / "model.safetensors").is_file():
            train(arguments, name, folder, base=folders.get("coral"))
        folders[name] = str(folder)
    return folders


def train(arguments: Arguments, name: str, folder: Path, base: str | None) -> None:
    if not arguments.responses:
        raise ValueError(f"{folder} contains no drafter: give --responses to train it, or --drafters NAME=FOLDER.")
    command = ["train", "--target", arguments.target, "--data", *arguments.responses, "--report_to", "none"]
    command += ["--output_dir", str(folder), "--overwrite_output_dir", "true"]  # left by an interrupted run
    command += ["--max_steps", str(arguments.max_steps), "--learning_rate", str(arguments.learning_rate)]
    if name == ROUTED:
        command += ["--stage", "router", "--drafter", base, "--router_groups", str(arguments.router_groups)]
        command += ["--shortlist_size", str(arguments.shortlist_size), "--rollout_schedule", "3", "--csra_weight", "0"]
    else:
        command += ["--preset", name, "--shape", arguments.shape]
    if coral_hf(command) != 0:
        raise ValueError(f"{name} was not trained.")


def main() -> None:
    (arguments,) = parse_script(Arguments)
    check_output_folder(arguments.output)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    prompts = read_prompts(arguments.data, arguments.limit)
    resolve_dtype(arguments.dtype, resolve_device(arguments.device))  # before anything is trained
    folders = drafter_folders(arguments)
    target, tokenizer = load_target(arguments.target, arguments.dtype, arguments.device)
    methods = []
    for name, folder in folders.items():
        drafter = load_drafter(folder).to(device=target.device, dtype=target.dtype)
        method = parse_methods([arguments.method], {folder: drafter})[0]
        method.name = name
        methods.append(method)
    size, temperatures = arguments.max_new_tokens, arguments.temperature
    record = run_benchmark(target, tokenizer, methods, prompts, arguments.output, size, temperatures)
    rows = {(row["method"], row["benchmark"], row["temperature"]): row for row in record["runs"]}
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in record["runs"]))
    for temperature in record["temperatures"]:
        print(f"\ntemperature {temperature:g}".ljust(29) + "".join(name.rjust(18) for name in benchmarks))
        for name in folders:
            cells = [rows[name, benchmark, temperature] for benchmark in benchmarks]
            text = (f"{row['speedup']:.2f}x, tau {row['acceptance_length']:.2f}" for row in cells)
            print(name.ljust(28) + "".join(cell.rjust(18) for cell in text))
    environment = record["environment"]
    print(
        f"\nhere: {record['target']}, {environment['device']}, {environment['dtype']}, {environment['threads']} threads"
    )
    print(f"the paper's own: {PAPER}")


if __name__ == "__main__":
    run_script(main)
