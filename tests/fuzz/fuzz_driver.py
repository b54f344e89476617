"""Shared by the fuzz scripts: the cases of a seed one after the other, their counts, and the command line."""

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import logging


class Fault(Exception):
    """What is wrong with a case; the error that revealed it, if any, is its cause."""


def quiet() -> None:
    """One thread, as in the suite; only faults are printed."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def run_cases(
    script: str,
    run_case: Callable[[int], dict[str, int]],
    counted: Iterable[str],
    seed: int,
    start: int,
    count: int,
    verbose: bool,
) -> dict:
    """Runs cases and returns their counts; every fault is printed with the command that reproduces it.

    Args:
        script (`str`): name of the script, for that command.
        run_case: index of a case -> what to count of it; raises [`Fault`].
        counted: names that are 0 where no case counted them.
        seed (`int`), start (`int`), count (`int`): the cases.
        verbose (`bool`): print the traceback of a fault.
    """
    total = {"cases": 0, "faults": 0, **dict.fromkeys(counted, 0)}
    began = time.perf_counter()
    for index in range(start, start + count):
        total["cases"] += 1
        try:
            for name, value in run_case(index).items():
                total[name] = total.get(name, 0) + value
        except Fault as fault:
            total["faults"] += 1
            if verbose:
                traceback.print_exc()
            print(f"python tests/fuzz/{script} --seed {seed} --start {index} --count 1 --verbose", flush=True)
            print(f"    {fault}", flush=True)
    return {"seed": seed, "start": start, **total, "seconds": round(time.perf_counter() - began, 1)}


def run_drawn(
    script: str,
    draw: Callable[[int, int], Any],
    run_case: Callable[[Any], dict[str, int]],
    counted: Iterable[str],
    seed: int,
    start: int,
    count: int,
    verbose: bool,
) -> dict:
    """[`run_cases`] of random calls of `generate`: any error but a [`Fault`] becomes one, with its case.

    Args:
        script, counted, seed, start, count, verbose: as for [`run_cases`].
        draw: seed and index -> a case, with `generation` and `draft`.
        run_case: a case -> what to count of it; raises [`Fault`].
    """
    quiet()

    def numbered(index: int) -> dict[str, int]:
        case = draw(seed, index)
        try:
            counts = run_case(case)
        except Fault:
            raise
        except Exception as error:
            raise Fault(f"{type(error).__name__}: {str(error)[:600]}\n    {case}") from error
        return {**counts, "sampled": case.generation["do_sample"], "trees": case.draft["draft_top_k"] > 1}

    return run_cases(script, numbered, (*counted, "sampled", "trees"), seed, start, count, verbose)


def main(description: str, run: Callable[[int, int, int, bool], dict], count: int) -> int:
    """The command line of a script, whose `run` takes seed, start, count and verbose; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first case")
    parser.add_argument("--verbose", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    total = run(arguments.seed, arguments.start, arguments.count, arguments.verbose)
    print(json.dumps(total))
    return 1 if total["faults"] else 0
