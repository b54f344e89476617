"""The command line: `coral-hf demo | regenerate | train | benchmark | convert`, one verb each."""

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from . import __version__, demo


DEMO = "demo"


def load_target(name: str, dtype: str):
    """A target and its tokenizer by path or Hub id; `demo` is the embedded one."""
    resolved = resolve_dtype(dtype)
    if name == DEMO:
        return demo.load_target(resolved)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=resolved)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def load_drafter(name: str):
    """A drafter by path or Hub id; `demo` is the shipped one."""
    from .modeling_coral import CoralDraftModel

    return demo.load_drafter() if name == DEMO else CoralDraftModel.from_pretrained(name, dtype="auto").eval()


def resolve_dtype(name: str) -> torch.dtype:
    """`'bfloat16'` -> `torch.bfloat16`; `ValueError` for what is no floating-point dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype {name!r} is unknown; use bfloat16, float16 or float32.")
    return dtype


@dataclass
class DemoCommand:
    """Generate with and without the shipped drafter on a real small model.

    Example: coral-hf demo --max-new-tokens 128
    """

    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the timed runs."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens generated per prompt."})
    prompt: str | None = field(default=None, metadata={"help": "One prompt of your own instead of the built-in ones."})
    json: str | None = field(default=None, metadata={"help": "Write the figures to this file."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from .evaluation.demo_run import run_demo

        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} must be at least 1.")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        record = run_demo(resolve_dtype(self.dtype), self.max_new_tokens, self.prompt)
        if self.json is not None:
            Path(self.json).write_text(json.dumps(record, indent=2) + "\n")
        return 0 if record["identical"] else 1


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
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from .training.regenerate import regenerate
        from .training.response_files import iter_prompts, iter_responses, write_shards

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = list(iter_prompts(self.prompts))
        exclude = {row["id"] for path in self.exclude for row in iter_responses(path)}
        target, tokenizer = load_target(self.target, self.dtype)
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


@dataclass
class TrainCommand:
    """Train a drafter on the target's own responses. Takes every TrainingArguments flag as well.

    Example: coral-hf train --target demo --data responses.jsonl --output_dir outputs/drafter --preset coral
    """

    data: list[str] = field(metadata={"help": "Response files (.jsonl, .jsonl.gz, .parquet) or folders of shards."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the frozen target."})
    drafter: str | None = field(default=None, metadata={"help": "Go on from this drafter instead of a new one."})
    shape: str | None = field(default=None, metadata={"help": "Shape of a new drafter: eagle or eagle3."})
    router_groups: int | None = field(
        default=None, metadata={"help": "With --stage router: give the drafter a new router of this many groups."}
    )
    shortlist_size: int | None = field(
        default=None,
        metadata={"help": "Also give the drafter a shortlist of this many ids, the most frequent in the responses."},
    )
    eval_rows: int = field(default=64, metadata={"help": "Rows held out for evaluation (the first ones; 0: none)."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self, args) -> int:
        from .modeling_coral import CoralDraftModel
        from .training.data import read_rows
        from .training.router_trainer import CoralRouterTrainer
        from .training.trainer import CoralTrainer

        router_stage = args.stage == "router"
        if router_stage and self.drafter is None:
            raise ValueError("--stage router trains the router of a trained drafter: name it with --drafter.")
        if self.router_groups is not None and not router_stage:
            raise ValueError(f"--router_groups {self.router_groups} adds a router: train it with --stage router.")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        rows = read_rows(self.data)
        if not 0 <= self.eval_rows < len(rows):
            raise ValueError(f"--eval_rows {self.eval_rows}: the files hold {len(rows)} rows; leave some to train on.")
        target, tokenizer = load_target(self.target, self.dtype)
        if self.drafter is not None:
            if self.shape is not None:
                raise ValueError(f"--shape {self.shape} is for a new drafter; --drafter {self.drafter} has its own.")
            drafter = load_drafter(self.drafter).float()
        else:
            overrides = {} if self.shape is None else {"shape": self.shape}
            if self.target == DEMO:
                overrides["target_revision"] = demo.TARGET_REVISION
            drafter = CoralDraftModel.from_target(target, tokenizer, **overrides)
        if self.router_groups is not None:
            drafter.add_router(self.router_groups)
        trainer = (CoralRouterTrainer if router_stage else CoralTrainer)(
            model=drafter,
            target_model=target,
            args=args,
            train_dataset=rows[self.eval_rows :],
            eval_dataset=rows[: self.eval_rows] or None,
            processing_class=tokenizer,
        )
        if self.shortlist_size is not None:
            drafter.add_shortlist(
                trainer.train_dataset.response_counts(drafter.config.vocab_size), self.shortlist_size
            )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        metrics = trainer.evaluate() if self.eval_rows else {}
        trainer.save_model()
        trainer.save_state()
        print(json.dumps(metrics))
        return 0


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
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from .evaluation.benchmark import Method, print_table, run_benchmark
        from .evaluation.prompts import read_prompts
        from .evaluation.step_profile import profile_methods

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = read_prompts(self.data, self.limit)
        drafter = load_drafter(self.drafter)
        methods = [Method.parse(text, drafter) for text in self.method]
        target, tokenizer = load_target(self.target, self.dtype)
        drafter.to(target.dtype)
        print_table(run_benchmark(target, tokenizer, methods, prompts, self.output, self.max_new_tokens))
        if self.profile:
            profile_methods(target, tokenizer, methods, prompts, self.output, self.max_new_tokens)
        return 0


@dataclass
class ConvertCommand:
    """Turn an EAGLE, HASS or EAGLE-3 checkpoint into a drafter, or a drafter into a serving engine's checkpoint.

    Example: coral-hf convert --from eagle org/EAGLE3-model outputs/drafter --target org/model
        coral-hf convert --to vllm demo outputs/for-vllm
    """

    POSITIONAL: ClassVar[dict[str, str]] = {
        "input": "Path or Hub id of the checkpoint; with --to also 'demo', the shipped drafter.",
        "output": "Folder to write, new or empty.",
    }

    from_format: str | None = field(default=None, metadata={"aliases": ["--from"], "help": "Read this format: eagle."})
    to: str | None = field(default=None, metadata={"help": "Write for vllm, sglang, speculators or eagle."})
    target: str | None = field(
        default=None, metadata={"help": "Path or Hub id of the target, or 'demo' (the default with --from)."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype the target is loaded in, where it is needed."})
    target_feature_layers: list[int] | None = field(
        default=None, metadata={"help": "With --from: the target layers whose inputs an EAGLE-3 checkpoint reads."}
    )

    def run(self, positional) -> int:
        from .conversion.commands import convert_from, convert_to
        from .modeling_coral import CoralDraftModel

        if (self.from_format is None) == (self.to is None):
            raise ValueError("Give one of --from FORMAT and --to ENGINE.")
        if self.from_format is not None:
            target, _ = load_target(self.target or DEMO, self.dtype)
            layers = self.target_feature_layers
            convert_from(CoralDraftModel, self.from_format, positional.input, positional.output, target, layers)
            return 0
        drafter = load_drafter(positional.input)
        needs_target = self.to == "eagle" and drafter.config.shape == "eagle3" and self.target is not None
        target = load_target(self.target, self.dtype)[0] if needs_target else None
        convert_to(self.to, drafter, positional.output, target, None if self.target == DEMO else self.target)
        return 0


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the example on a line of its own."""


COMMANDS: dict[str, type] = {
    "demo": DemoCommand,
    "regenerate": RegenerateCommand,
    "train": TrainCommand,
    "benchmark": BenchmarkCommand,
    "convert": ConvertCommand,
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    verbs = "\n".join(f"  {verb:<{width}}  {command.__doc__.splitlines()[0]}" for verb, command in COMMANDS.items())
    return f"usage: coral-hf VERB [options]\n\nverbs:\n{verbs}\n\n`coral-hf VERB --help` lists a verb's options."


def _parse(verb: str, arguments: list[str]) -> Callable[[], int]:
    command = COMMANDS[verb]
    types = [command]
    if verb == "train":
        from .training.arguments import CoralTrainingArguments

        types.append(CoralTrainingArguments)
    parser = HfArgumentParser(
        types, prog=f"coral-hf {verb}", description=inspect.cleandoc(command.__doc__), formatter_class=_HelpFormatter
    )
    for name, text in getattr(command, "POSITIONAL", {}).items():
        parser.add_argument(name, help=text)
    parsed = parser.parse_args_into_dataclasses(args=_underscores(arguments))
    return lambda: parsed[0].run(*parsed[1:])


def _underscores(arguments: list[str]) -> list[str]:
    """Options may be written with dashes or underscores."""
    return [
        "--"
        + argument[2:].split("=", 1)[0].replace("-", "_")
        + ("=" + argument.split("=", 1)[1] if "=" in argument else "")
        if argument.startswith("--")
        else argument
        for argument in arguments
    ]


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; errors that a user can mend end in one line and status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"coral-hf: unknown verb {arguments[0]!r}; the verbs are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return _parse(arguments[0], arguments[1:])()
    except (ValueError, OSError, ImportError) as error:
        print(f"coral-hf {arguments[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
