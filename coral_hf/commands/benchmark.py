"""`coral-hf benchmark`: plain decoding, drafters and other methods, timed side by side."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .loading import DEMO, DrafterOptions, load_drafter, load_target, require
from .outputs import OutputOptions, check_output_folder, finished
from .rendering import FORMATS_HELP, DataOptions, RenderingOptions


# defaults of --quick: a few minutes on two cores with a target of 135 M parameters
QUICK = {"limit": 2, "max_new_tokens": 32}
MAX_NEW_TOKENS = 128


@dataclass
class BenchmarkCommand(RenderingOptions, DrafterOptions, DataOptions, OutputOptions):
    """Time plain decoding and drafting side by side; write benchmark.json and plots.

    Examples:
        coral-hf benchmark --quick --output outputs/quick
        coral-hf benchmark --target your/model --drafter outputs/drafter --data prompts.jsonl --limit 10 --output outputs/bench
        coral-hf benchmark --data prompts.jsonl --batch-size 1 4 8 --context 256 2048 --output outputs/batches
    """

    output: str = field(metadata={"aliases": ["--output_dir"], "help": "Folder for benchmark.json and the plots."})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": f"Prompts to answer: {FORMATS_HELP} (default: the demo's prompts)."},
    )
    drafter: list[str] = field(
        default_factory=lambda: [DEMO], metadata={"help": "Paths or Hub ids of drafters, or 'demo'."}
    )
    assistant: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of an ordinary small model, which adds the method 'assistant', or, with --method dflash, of a "
            "DFlash drafter."
        },
    )
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the models; auto: bfloat16 where it is computed natively."}
    )
    limit: int | None = field(default=None, metadata={"help": "Prompts per file."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Tokens generated per turn (default: {MAX_NEW_TOKENS})."}
    )
    method: list[str] = field(
        default_factory=lambda: ["coral"],
        metadata={
            "help": "What to compare with plain decoding: coral (the drafter's own settings), chain, eagle2 (60 nodes), "
            "prompt_lookup, assistant, mtp (the target's own layers for multi-token prediction), dflash (a DFlash drafter, named with "
            "--assistant), plain_compiled (plain generate with a static cache and torch.compile), or "
            "NAME:setting=value,setting=value (draft_compile=true compiles CORAL's steps)."
        },
    )
    temperature: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "Temperatures; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampled answers."})
    repeats: int = field(
        default=1,
        metadata={"help": "Runs of each prompt with every method; the fastest run of each method counts."},
    )
    batch_size: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Measure batches of these sizes (first turns, greedy) instead of single prompts; writes "
            "batches.json and batches.png."
        },
    )
    context: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Prompt lengths in tokens for batches (of 1 if no size is given). Prompts are extended with text from the data."
        },
    )
    quick: bool = field(default=False, metadata={"help": f"A quick run of a few minutes; sets {QUICK} unless given."})
    profile: bool = field(
        default=False,
        metadata={"help": "Also time the parts of a step on two prompts per benchmark; writes step_time.json."},
    )
    server_tau: bool = field(
        default=False,
        metadata={
            "help": "Also count tokens accepted beyond an answer's end, as vLLM does. Each prompt then gets one more greedy answer."
        },
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..evaluation.benchmark import describe_run, differences, print_table, run_benchmark, slower_than_plain
        from ..evaluation.methods import check_temperatures, other_mode, parse_methods
        from ..evaluation.plots import plot_benchmark
        from ..evaluation.step_profile import profile_methods

        require("rich", "matplotlib")
        check_output_folder(self.output)
        check_temperatures(self.temperature)
        if (self.batch_size or self.context) and (self.profile or self.server_tau or self.temperature != [0.0]):
            raise ValueError(
                "--batch-size and --context measure whole greedy answers: leave --profile, --server-tau and --temperature "
                "out."
            )
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        tokens = self.max_new_tokens
        if tokens is None:
            tokens = QUICK["max_new_tokens"] if self.quick else MAX_NEW_TOKENS
        if repeated := [name for name in dict.fromkeys(self.drafter) if self.drafter.count(name) > 1]:
            raise ValueError(
                f"--drafter names {repeated[0]} more than once. Remove the repetition, or add a --method to measure the drafter with "
                "other settings."
            )
        prompts = self._prompts()
        texts = list(self.method)
        named = {text.partition(":")[0] for text in texts} & {"assistant", "dflash"}
        if len(named) > 1:
            raise ValueError("--method assistant dflash: one --assistant is not both; measure them in two runs.")
        if self.assistant is not None and not named:
            texts.append("assistant")
        # check the names before loading any model, so that a typo costs nothing
        parse_methods(texts, {name: name for name in self.drafter}, self.assistant)
        drafters = {name: load_drafter(name, self.drafter_revision) for name in self.drafter}
        target, tokenizer = self.load_target(self.dtype)
        for drafter in drafters.values():
            drafter.to(device=target.device, dtype=target.dtype)
            if (line := other_mode(drafter, tokenizer)) is not None:
                print(line, file=sys.stderr)
        assistant = None
        if self.assistant is not None:
            assistant = self._load_assistant(self.assistant, target, "dflash" in named)
        methods = parse_methods(texts, drafters, assistant)
        if self.batch_size or self.context:
            return self._run_batches(target, tokenizer, methods, prompts, tokens)
        path = Path(self.output) / "benchmark.json"
        self.check_record(path, describe_run(target, tokenizer, methods, prompts, tokens, self.temperature, self.seed))
        try:
            record = run_benchmark(
                target,
                tokenizer,
                methods,
                prompts,
                self.output,
                tokens,
                self.temperature,
                self.seed,
                self.repeats,
                self.server_tau,
            )
        except KeyboardInterrupt:
            # An older record is kept until the first prompt is finished.
            print(
                f"coral-hf benchmark: interrupted; finished prompts, if any, are in {path}, marked partial.",
                file=sys.stderr,
            )
            return 130
        print_table(record)
        profile = None
        if self.profile:
            profile = profile_methods(target, tokenizer, methods, prompts, self.output, tokens)
        for picture in plot_benchmark(record, self.output, profile):
            print(picture)
        for line in differences(record):
            print(line, file=sys.stderr)
        if (advice := slower_than_plain(record)) is not None:
            print(advice)
        finished(path, then=f"coral-hf card DRAFTER (reads {path.name} from DRAFTER/training)")
        return 0

    def _load_assistant(self, name: str, target, dflash: bool):
        if dflash:
            from transformers import AutoModel  # it has no LM head of its own

            how = {"dtype": target.dtype, "trust_remote_code": self.trust_remote_code}
            return AutoModel.from_pretrained(name, **how).to(target.device).eval()
        place, trusted = str(target.device), self.trust_remote_code
        return load_target(name, target.dtype, place, trust_remote_code=trusted, role="assistant")[0]

    def _run_batches(self, target, tokenizer, methods, prompts, tokens: int) -> int:
        from ..evaluation.batches import RECORD_FILE, describe_batches, print_batches, run_batches
        from ..evaluation.plots import plot_batches

        sizes = self.batch_size or [1]
        contexts: list[int | None] = [*self.context] or [None]
        path = Path(self.output) / RECORD_FILE
        self.check_record(path, describe_batches(target, tokenizer, methods, prompts, sizes, contexts, tokens))
        record = run_batches(target, tokenizer, methods, prompts, self.output, sizes, contexts, tokens, self.repeats)
        print_batches(record)
        for picture in plot_batches(record, self.output):
            print(picture)
        finished(path)
        return 0

    def _prompts(self):
        from ..data.prompts import Prompt, read_prompts
        from ..evaluation.demo_run import PROMPTS

        limit = QUICK["limit"] if self.quick and self.limit is None else self.limit
        if self.data:
            return read_prompts(self.data, limit, **self.reading)
        return [Prompt(f"demo-{index}", "demo", (text,)) for index, text in enumerate(PROMPTS[:limit])]
