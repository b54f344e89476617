"""llama.cpp's server in its own interpreter, its greedy answers, and its counts."""

import json
import os
import shlex
import subprocess
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch


SCRIPT = Path(__file__).parent / "serve_xllamacpp.py"


@dataclass
class LlamaServer:
    """One that answers.

    Args:
        address (`str`): of the server.
        pid (`int`): of its process.
    """

    address: str
    pid: int

    def complete(self, ids: list[int], new_tokens: int) -> dict:
        """The greedy answer of `new_tokens` ids to a prompt of ids, and its timings, which count drafts."""
        body = {"prompt": ids, "n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
        request = urllib.request.Request(
            f"{self.address}/completion",
            json.dumps({**body, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def cpu_seconds(self) -> float:
        """The CPU time that the process has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(python: str, command: str, log: Path):
    """A [`LlamaServer`] from a printed `llama-server` command. It is always ended, by its process id."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(SCRIPT), *shlex.split(command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    try:
        address = process.stdout.readline().strip()
        assert address, f"llama.cpp ended with status {process.wait()}:\n{log.read_text()[-3000:]}"
        yield LlamaServer(address, process.pid)
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        finally:
            process.kill()


def write_dequantised(source: Path, path: Path) -> Path:
    """A target's GGUF file in float32, each weight rounded to bfloat16 as `demo.load_target` stores it."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        weights = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        writer.add_tensor(tensor.name, weights.bfloat16().float().numpy())
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return path
