"""Times the target's forward pass over 1, 4, 8 and 16 nodes after a context, as chains and trees, and plain `generate`'s.

    python benchmarks/benchmark_verify.py --threads 2 --json outputs/verify_times.json
    python benchmarks/benchmark_verify.py --contexts 200,3000 --nodes 1,8 --rounds 20 --json FILE

Runs the demo's target over random tokens, in float32 unless --dtype is set. Forms alternate in rounds. Reports medians, and the
ratio of each form to plain `generate`'s forward pass over one token (`plain`, in Transformers' dynamic cache). No node is kept
after a forward pass, so that the context stays the same.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from coral_hf import demo
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.drafter.few_rows import few_row_linears
from coral_hf.evaluation.environment import describe_environment, describe_target
from coral_hf.generation.draft_tree import DraftTree, ancestors_of
from coral_hf.generation.key_values.store_forward import StoreForward
from coral_hf.utils.compat import cache_kwarg


@dataclass
class Arguments:
    json: str = field(metadata={"help": "File for the record."})
    contexts: str = field(default="200,3000", metadata={"help": "Tokens before the nodes."})
    nodes: str = field(default="1,4,8,16", metadata={"help": "Nodes of each forward."})
    rounds: int = field(default=12, metadata={"help": "Timed rounds; one more warms up."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the target."})
    device: str = field(default="cpu", metadata={"help": "Device of the target."})


def tree_of(ids: torch.Tensor, branches: int) -> DraftTree:
    """A chain of `[1, N]` tokens for one branch, else a tree in which every node has this many children."""
    if branches == 1:
        return DraftTree.chain(ids)
    order = torch.arange(ids.shape[1], device=ids.device)
    parents = torch.where(order == 0, -1, (order - 1) // branches)[None]
    ancestors = ancestors_of(parents, ids.shape[1])
    return DraftTree(ids, parents, ancestors.sum(dim=2) - 1, torch.zeros(ids.shape), ancestors)


def forms(target: Any, context: int, nodes: list[int]) -> dict[str, Callable[[], Any]]:
    """The forwards of one context, by name."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, target.config.vocab_size, (1, context + max(nodes)), generator=generator).to(target.device)
    plain_cache, cache = DynamicCache(config=target.config), DynamicCache(config=target.config)
    for filled in (plain_cache, cache):
        target(ids[:, :context], use_cache=True, logits_to_keep=1, **cache_kwarg(filled))
    forward = StoreForward(target, 1)
    forward.store.load(cache, [0], [0], [context])
    plain_cache.activate_past_recording()

    def plain() -> None:
        target(ids[:, context : context + 1], use_cache=True, **cache_kwarg(plain_cache))
        plain_cache.crop(-1)

    found: dict[str, Callable[[], Any]] = {"plain": plain}
    for count in nodes:
        trees = {"chain": 1} if count < 3 else {"chain": 1, "tree": 2}
        for name, branches in trees.items():
            tree = tree_of(ids[:, context : context + count], branches)
            found[f"{name}_{count}"] = lambda tree=tree: forward.run(tree, output_hidden_states=False)
    return found


def main() -> None:
    (arguments,) = parse_script(Arguments)
    check_output_file(arguments.json)
    torch.set_num_threads(arguments.threads)
    target = demo.load_target(getattr(torch, arguments.dtype))[0].to(arguments.device)
    nodes = [int(count) for count in arguments.nodes.split(",")]
    record: dict[str, Any] = {
        "environment": describe_environment(target.device, target.dtype),
        **describe_target(target),
        "rounds": arguments.rounds,
        "contexts": {},
    }
    with torch.no_grad(), few_row_linears(target):
        for context in map(int, arguments.contexts.split(",")):
            seconds: dict[str, list[float]] = {}
            found = forms(target, context, nodes)
            for round_number in range(arguments.rounds + 1):
                for name, form in found.items():
                    start = time.perf_counter()
                    form()
                    if target.device.type == "cuda":
                        torch.cuda.synchronize()
                    if round_number:
                        seconds.setdefault(name, []).append(time.perf_counter() - start)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            record["contexts"][str(context)] = {
                name: {"ms": 1000 * value, "over_plain": value / median["plain"]} for name, value in median.items()
            }
    Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["contexts"], indent=1))


if __name__ == "__main__":
    run_script(main)
