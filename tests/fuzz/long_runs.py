"""Long runs of one process: is memory flat, is speed flat?

    python tests/fuzz/long_runs.py                       # 8,000 new tokens in one call, then 1,000 calls; a tiny target in float32
    python tests/fuzz/long_runs.py --tokens 800 --calls 100

Prints JSON: for each quarter of the run the resident memory at its end (MB) and tokens per second. The KV cache of the
tiny target grows by about 2 kB a token, attention by its length. Exit status 1 if memory grew by more than `--most-mb`
between the first and the last quarter. `tests/fuzz/test_long_runs.py` runs a slice.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers

from helpers.tiny_models import COMMON, make_drafter
from transformers import LlamaConfig, LlamaForCausalLM, logging
from transformers.generation.streamers import BaseStreamer

from coral_hf import coral_generate


def resident_mb() -> float:
    """Resident memory of this process now; its peak where /proc is missing."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make_pair(positions: int):
    """A tiny Llama in float32 with room for `positions`, and a random drafter that drafts trees."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "max_position_embeddings": positions, "eos_token_id": None})
    target = LlamaForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    return target, make_drafter(target, draft_depth=4, draft_top_k=3, draft_total_tokens=12)


class _Quarters(BaseStreamer):
    """Notes time and memory at every quarter of the tokens."""

    def __init__(self, tokens: int):
        self.tokens, self.seen, self.rows = tokens, -1, []
        self.last = (0, time.perf_counter())

    def put(self, value):
        if self.seen < 0:  # the prompt
            self.seen = 0
            return
        self.seen += 1
        if self.seen * 4 >= self.tokens * (len(self.rows) + 1):
            self.rows.append(_row(self.seen - self.last[0], time.perf_counter() - self.last[1]))
            self.last = (self.seen, time.perf_counter())

    def end(self):
        pass


def _row(tokens: int, seconds: float) -> dict[str, float]:
    return {"resident_mb": round(resident_mb(), 1), "tokens_per_second": round(tokens / seconds, 1)}


def one_call(tokens: int) -> list[dict[str, float]]:
    """`tokens` new tokens in one call."""
    target, drafter = make_pair(tokens + 100)
    quarters = _Quarters(tokens)
    ids = torch.tensor([[5, 9, 3, 77, 31]])
    output = target.generate(ids, max_new_tokens=tokens, do_sample=False, assistant_model=drafter, streamer=quarters)
    assert output.shape[1] == ids.shape[1] + tokens
    return quarters.rows


def many_calls(calls: int, tokens: int = 16) -> list[dict[str, float]]:
    """`calls` calls of `tokens` new tokens, greedy and sampled, chains and trees in turn."""
    target, drafter = make_pair(512)
    rows = []
    for quarter in range(4):
        start = time.perf_counter()
        count = calls * (quarter + 1) // 4 - calls * quarter // 4
        for number in range(count):
            coral_generate(
                target,
                drafter,
                input_ids=torch.randint(3, 128, (1, 5 + number % 20)),
                draft_top_k=1 + number % 3,
                do_sample=number % 2 == 0,
                max_new_tokens=tokens,
            )
        rows.append(_row(count * tokens, time.perf_counter() - start))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--most-mb", type=float, default=64.0)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    record = {"one_call": one_call(arguments.tokens), "many_calls": many_calls(arguments.calls)}
    print(json.dumps(record, indent=2))
    grown = max(rows[-1]["resident_mb"] - rows[0]["resident_mb"] for rows in record.values())
    return 1 if grown > arguments.most_mb else 0


if __name__ == "__main__":
    sys.exit(main())
