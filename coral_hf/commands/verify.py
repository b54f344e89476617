"""`coral-hf verify`: compares a drafter's answers with plain `generate`'s, token by token."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .loading import DEMO, DrafterOptions, load_drafter, require
from .outputs import OutputOptions, check_output_folder, finished
from .rendering import FORMATS_HELP, DataOptions, RenderingOptions


@dataclass
class VerifyCommand(RenderingOptions, DrafterOptions, DataOptions, OutputOptions):
    """Compare a drafter's answers with plain decoding turn by turn, token by token; exit status 1 if any differs.

    Examples:
        coral-hf verify --target your/model --drafter outputs/drafter --data prompts.jsonl --limit 10
        coral-hf verify --data mt_bench.jsonl gsm8k.jsonl --limit 10 --output outputs/drafter/training
        coral-hf verify --data prompts.jsonl --method coral chain_of_5:draft_depth=5,draft_top_k=1 --temperature 1
    """

    data: list[str] = field(metadata={"help": f"Prompts to answer: {FORMATS_HELP}."})
    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of the drafter, or 'demo'."})
    method: list[str] = field(
        default_factory=lambda: ["coral"],
        metadata={
            "help": "Draft settings to check, as NAME or NAME:setting=value,setting=value (draft_compile=true checks compiled "
            "steps)."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens generated per turn."})
    temperature: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Temperatures to sample at with the same seed; greedy decoding is always checked."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampled answers."})
    dtype: str = field(
        default="float32", metadata={"help": "Dtype of the models; float32 proves identity, bfloat16 has near-ties."}
    )
    output: str | None = field(
        default=None, metadata={"aliases": ["--output_dir"], "help": "Folder for one check_NAME.json per method."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..data.prompts import read_prompts
        from ..evaluation.methods import check_temperatures, other_mode, parse_methods
        from ..evaluation.verify import check_file, describe_run, print_checks, verify

        require("rich")
        check_output_folder(self.output)
        check_temperatures(self.temperature)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = read_prompts(self.data, self.limit, **self.reading)
        # check the name before loading any model, so that a typo costs nothing
        parse_methods(self.method, {self.drafter: self.drafter})
        drafter = load_drafter(self.drafter, self.drafter_revision)
        methods = parse_methods(self.method, {self.drafter: drafter})
        target, tokenizer = self.load_target(self.dtype)
        drafter.to(device=target.device, dtype=target.dtype)
        if (line := other_mode(drafter, tokenizer)) is not None:
            print(line, file=sys.stderr)
        for method in methods if self.output is not None else ():
            path = check_file(Path(self.output or ""), method)
            self.check_record(path, describe_run(target, tokenizer, method, prompts, self.max_new_tokens))
        checks = verify(
            target, tokenizer, methods, prompts, self.max_new_tokens, self.temperature, self.seed, self.output
        )
        print_checks(checks, str(target.dtype).removeprefix("torch."))
        data = " ".join(self.data)
        bench = f"coral-hf benchmark --target {self.target} --drafter {self.drafter} --data {data} --output FOLDER"
        if any(check.different or not check.n_turns for check in checks):
            return 1  # the warning is the last line, because a drafter that fails has no next step
        finished(self.output, then=bench)
        return 0
