"""`coral-hf benchmark`: plain and CORAL decoding, timed side by side."""

from dataclasses import dataclass, field

import torch

from .loading import DEMO, load_drafter, load_target


@dataclass
class BenchmarkCommand:
    """Time plain and CORAL decoding side by side and write benchmark.json.

    Example: coral-hf benchmark --target demo --drafter demo --data mt_bench.jsonl --limit 10 --output outputs/bench
        --method chain:draft_top_k=1 tree:draft_top_k=4,draft_total_tokens=16 lookup:prompt_lookup_num_tokens=5
    """

    data: list[str] = field(metadata={"help": "JSONL files of {'id', 'turns'} rows."})
    output: str = field(metadata={"help": "Folder for benchmark.json."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of the drafter, or 'demo'."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the target."})
    limit: int | None = field(default=None, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens generated per prompt."})
    method: list[str] = field(
        default_factory=lambda: ["coral"],
        metadata={"help": "What to compare with plain decoding, as NAME or NAME:setting=value,setting=value."},
    )
    profile: bool = field(default=False, metadata={"help": "Then write where a step's time goes to step_time.json."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..evaluation.benchmark import print_table, run_benchmark
        from ..evaluation.methods import Method
        from ..evaluation.prompts import read_prompts
        from ..evaluation.step_profile import profile_methods

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = read_prompts(self.data, self.limit)
        drafter = load_drafter(self.drafter)
        methods = [Method.parse(text, drafter) for text in self.method]
        target, tokenizer = load_target(self.target, self.dtype, self.device)
        drafter.to(device=target.device, dtype=target.dtype)
        print_table(run_benchmark(target, tokenizer, methods, prompts, self.output, self.max_new_tokens))
        if self.profile:
            profile_methods(target, tokenizer, methods, prompts, self.output, self.max_new_tokens)
        return 0
