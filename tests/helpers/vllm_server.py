"""A vLLM server on loopback, in its own interpreter, and the counts in its metrics."""

import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress
from urllib.error import URLError


START_SECONDS = 900
# One sequence of 512 tokens, and the kernels that plain torch has
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "1")
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def module_command(python: str, command: str) -> list[str]:
    """A printed `vllm serve MODEL ...` as a call of the module.

    The console script of the CPU build looks for a distribution named vllm.
    """
    program, verb, model, *rest = shlex.split(command)
    assert (program, verb) == ("vllm", "serve")
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *rest]


@contextmanager
def serving(python: str, command: str, log):
    """Starts a server with `command` and yields its address once it answers. It is always ended, by its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | QUIET
    arguments = [*module_command(python, command), *FLAGS, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        # a session of its own, whose id is the process's: the engine is a child of the server
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(process, address: str, log) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"vLLM ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(2)
    raise AssertionError(f"vLLM did not answer within {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def draft_counters(address: str) -> dict[str, int]:
    """vLLM's counts of drafts, drafted and accepted tokens since its start."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name in COUNTERS:
        values = re.findall(rf"^vllm:spec_decode_{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
        found[name] = int(sum(map(float, values)))
    return found
