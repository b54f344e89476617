"""`coral-hf demo`: plain and CORAL decoding on a real small model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from .loading import resolve_device, resolve_dtype
from .outputs import OutputOptions, check_output_file


@dataclass
class DemoCommand(OutputOptions):
    """Generate with and without the shipped drafter on a real small model.

    Examples:
        coral-hf demo
        coral-hf demo --prompt 'Why is the sky blue?' --max-new-tokens 64
        coral-hf demo --threads 2 --json demo.json
    """

    REFUSED: ClassVar[dict[str, str]] = dict.fromkeys(
        ("--target", "--drafter", "--target_revision", "--drafter_revision", "--trust_remote_code", "--device_map"),
        "demo only runs the shipped pair. For your own pair, use `coral-hf benchmark --quick --target MODEL --drafter DRAFTER`.",
    )

    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the timed runs; auto: bfloat16 where it is computed natively."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens generated per prompt."})
    prompt: str | None = field(default=None, metadata={"help": "One prompt of your own instead of the built-in ones."})
    json: str | None = field(default=None, metadata={"help": "Write the figures to this file."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..evaluation.demo_run import run_demo

        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} must be at least 1.")
        check_output_file(self.json)
        if self.json is not None:
            self.check_record(self.json, {"max_new_tokens": self.max_new_tokens}, "json")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = resolve_device(self.device)
        record = run_demo(resolve_dtype(self.dtype, device), self.max_new_tokens, self.prompt, device)
        if self.json is not None:
            Path(self.json).write_text(json.dumps(record, indent=2) + "\n")
        return 0 if record["identical"] else 1
