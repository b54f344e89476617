"""The command line: `coral-hf demo | regenerate | train | benchmark | tune | verify | ...`, one verb each (see `commands/`)."""

import sys

import torch

from .commands.benchmark import BenchmarkCommand
from .commands.cache import CacheCommand
from .commands.card import CardCommand
from .commands.convert import ConvertCommand
from .commands.demo import DemoCommand
from .commands.making.make import MakeCommand
from .commands.parsing.parser import parse_verb
from .commands.push import PushCommand
from .commands.regenerate import RegenerateCommand
from .commands.scripts import USER_ERRORS, one_line
from .commands.serve import ServeCommand
from .commands.train import TrainCommand
from .commands.tune import TuneCommand
from .commands.verify import VerifyCommand
from .utils.code_version import __version__
from .utils.compat import checkpointing_argument
from .utils.log_lines import log_lines


COMMANDS: dict[str, type] = {
    "demo": DemoCommand,
    "make": MakeCommand,
    "regenerate": RegenerateCommand,
    "train": TrainCommand,
    "benchmark": BenchmarkCommand,
    "tune": TuneCommand,
    "verify": VerifyCommand,
    "convert": ConvertCommand,
    "serve": ServeCommand,
    "card": CardCommand,
    "push": PushCommand,
    "cache": CacheCommand,
}


# ways to use less memory, by verb
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


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script. Errors that a user can fix end with one line and status 2, Ctrl-C with 130, and
    running out of memory with 1."""
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
    verb = arguments[0]
    try:
        with log_lines():
            return parse_verb(verb, COMMANDS[verb], arguments[1:])()
    except USER_ERRORS as error:
        print(f"coral-hf {verb}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"coral-hf {verb}: interrupted{f'; {interruption}' if interruption.args else ''}.", file=sys.stderr)
        return 130  # 128 + SIGINT, as in shells
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        remedy = _SMALLER[verb].format(checkpointing=checkpointing_argument())
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"coral-hf {verb}: out of memory ({reason}); {remedy}.", file=sys.stderr)
        return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether an accelerator or the machine is out of memory: torch's allocator for CPUs raises a plain `RuntimeError`."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    sys.exit(main())
