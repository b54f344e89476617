"""`coral-hf regenerate`: the target's own answers."""

import json
from dataclasses import dataclass, field

import torch

from .loading import DEMO, load_target


@dataclass
class RegenerateCommand:
    """Make the target answer prompts; resumes where an earlier run stopped.

    Example: coral-hf regenerate --prompts prompts.jsonl --output responses.jsonl
    """

    prompts: str = field(metadata={"help": "JSONL file of {'id', 'turns'} rows."})
    output: str = field(metadata={"help": "JSONL file of responses, appended to."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the target."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest response."})
    max_prompt_tokens: int = field(default=2048, metadata={"help": "Longer prompts are left out and counted."})
    slots: int = field(default=128, metadata={"help": "Conversations decoded at one time."})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampled responses."})
    max_turns: int | None = field(default=None, metadata={"help": "Answer at most this many turns a conversation."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Response files whose prompts are skipped."})
    shards: str | None = field(default=None, metadata={"help": "Also pack all rows as Parquet into this folder."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..training.data import read_rows
        from ..training.regenerate import regenerate
        from ..training.response_files import iter_prompts, write_shards

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = list(iter_prompts(self.prompts))
        exclude = {row["id"] for row in read_rows(self.exclude)} if self.exclude else set()
        target, tokenizer = load_target(self.target, self.dtype, self.device)
        stats = regenerate(
            target,
            tokenizer,
            prompts,
            self.output,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            slots=self.slots,
            temperature=self.temperature,
            seed=self.seed,
            max_turns=self.max_turns,
            exclude=exclude,
        )
        print(json.dumps(stats))
        if self.shards is not None:
            write_shards(self.output, self.shards)
        return 0
