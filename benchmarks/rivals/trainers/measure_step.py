"""One trainer's EAGLE-3 step on the batch that `compare_trainers.py` wrote, in its own process and environment.

    PYTHON measure_step.py NAME FOLDER [published]

NAME names a file `NAME_step.py` beside this one. Its `load(folder, settings)` returns a function that takes a step and returns the
loss, and the entries that describe it in the record. Its `published(folder, settings)` runs the trainer's own code unchanged; a failure is recorded
with the place that raised it. Prints one line of JSON last. Imports only torch: rivals' environments have no `coral_hf`.
"""

import argparse
import ctypes
import gc
import importlib
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def resident(peak: bool = False) -> int:
    """Bytes of this process that are resident, or the most since [`reset_peak`]."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status contains no {key}")


def reset_peak() -> None:
    """Starts a new measurement of peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(step: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Seconds by the clock and of this process, losses and memory of steps; the first two warm up and are not timed.

    `peak_gib` is the resident set over one step, libraries and weights included; `peak_above_start_gib` is what the step added.
    """
    losses = [step(), step()]  # the first also compiles, and makes the optimizer's state
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed would hide what this one takes
    reset_peak()
    before = resident()
    losses.append(step())
    peak = resident(peak=True)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": [round(value, 4) for value in seconds],
        "cpu_seconds": [round(value, 4) for value in cpu_seconds],
        "losses": [round(value, 5) for value in losses],
        "peak_gib": round(peak / 2**30, 3),
        "peak_above_start_gib": round((peak - before) / 2**30, 3),
    }


def where_it_stopped(error: BaseException, package: str) -> dict[str, str]:
    """An error's message, and the last line of a package that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if f"/site-packages/{package}/" in frame.filename]
    frame = (theirs or frames)[-1]
    place = frame.filename.rpartition("site-packages/")[2] if theirs else Path(frame.filename).name
    message = " ".join(str(error).split())
    return {
        "stopped_by": f"{type(error).__name__}: {message}",
        "at": f"{place}:{frame.lineno}",
        "line": frame.line or "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("published", nargs="?", choices=["published"])
    arguments = parser.parse_args()
    name, folder = arguments.name, arguments.folder
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    module = importlib.import_module(f"{name}_step")
    if arguments.published:
        try:
            module.published(folder, settings)
            found = {"stopped_by": None}
        except Exception as error:
            found = where_it_stopped(error, name)
    else:
        step, described = module.load(folder, settings)
        found = {**described, **measure(step, settings["repeats"])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
