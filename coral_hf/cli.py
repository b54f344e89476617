"""The command line: `coral-hf demo | regenerate | train | benchmark | tune | verify | ...`, one verb each (see `commands/`)."""

import argparse
import difflib
import inspect
import sys
from collections.abc import Callable

import torch
from transformers import HfArgumentParser

from .commands.benchmark import BenchmarkCommand
from .commands.cache import CacheCommand
from .commands.card import CardCommand
from .commands.convert import ConvertCommand
from .commands.demo import DemoCommand
from .commands.regenerate import RegenerateCommand
from .commands.scripts import USER_ERRORS, one_line
from .commands.train import TrainCommand
from .commands.tune import TuneCommand
from .commands.verify import VerifyCommand
from .utils.code_version import __version__
from .utils.compat import checkpointing_argument


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the example on a line of its own."""


COMMANDS: dict[str, type] = {
    "demo": DemoCommand,
    "regenerate": RegenerateCommand,
    "train": TrainCommand,
    "benchmark": BenchmarkCommand,
    "tune": TuneCommand,
    "verify": VerifyCommand,
    "convert": ConvertCommand,
    "card": CardCommand,
    "cache": CacheCommand,
}


# what takes less memory, by verb
_SMALLER = dict.fromkeys(COMMANDS, "try another --dtype, or a smaller model")
_SMALLER["train"] = (
    "try a smaller --per_device_train_batch_size (with more --gradient_accumulation_steps), --loss_chunk_size or "
    "--max_length, or --{checkpointing} true"
)
_SMALLER["regenerate"] = "try fewer --slots, or smaller --max_prompt_tokens or --max_new_tokens"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    verbs = "\n".join(
        f"  {verb:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for verb, command in COMMANDS.items()
    )
    return f"usage: coral-hf VERB [options]\n\nverbs:\n{verbs}\n\n`coral-hf VERB --help` lists a verb's options."


def _parse(verb: str, arguments: list[str]) -> Callable[[], int]:
    command = COMMANDS[verb]
    types = [command]
    if verb == "train":
        from .training.arguments import CoralTrainingArguments

        types.append(CoralTrainingArguments)
    parser = HfArgumentParser(
        types,
        prog=f"coral-hf {verb}",
        description=inspect.cleandoc(command.__doc__ or ""),
        formatter_class=_HelpFormatter,
    )
    for name, text in getattr(command, "POSITIONAL", {}).items():
        parser.add_argument(name, help=text)
    *parsed, unknown = parser.parse_args_into_dataclasses(args=_underscores(arguments), return_remaining_strings=True)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"`coral-hf {verb} --help` lists the options."
        hint = getattr(command, "REFUSED", {}).get(name, hint)  # what other verbs take
        raise ValueError(f"unknown option or argument {unknown[0]!r}; {hint}")
    threads = getattr(parsed[0], "threads", None)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads} must be at least 1.")
    limit = getattr(parsed[0], "limit", None)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1; leave it out for all prompts.")
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
    """Entry point of the console script; errors that a user can mend end in one line and status 2, Ctrl-C in 130, a
    full memory in 1."""
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
    except USER_ERRORS as error:
        print(f"coral-hf {arguments[0]}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"coral-hf {arguments[0]}: interrupted.", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        remedy = _SMALLER[arguments[0]].format(checkpointing=checkpointing_argument())
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"coral-hf {arguments[0]}: out of memory ({reason}); {remedy}.", file=sys.stderr)
        return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether an accelerator or the machine is out of memory: torch's allocator for CPUs raises a plain `RuntimeError`."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    sys.exit(main())
