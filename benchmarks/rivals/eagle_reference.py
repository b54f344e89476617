"""EAGLE's own decoding loop beside CORAL's: the same target, the same drafter, trees of the same size, greedily.

    python benchmarks/rivals/eagle_reference.py --checkout DIR --json FILE
    python benchmarks/rivals/eagle_reference.py --checkout DIR --drafter outputs/drafter --data prompts.jsonl --json FILE

DIR is a checkout of https://github.com/SafeAILab/EAGLE; `eagle_checkout.py` says what is changed when it is imported. Per step
and method the record contains verify steps, tokens per step, what is asked of a device (`coral_hf.evaluation.operation_counts`), and
the milliseconds outside of the target's forward, LM head included: `milliseconds` by the clock, `cpu_milliseconds` of this process.
Both targets have the same weights; EAGLE's runs in the code of its checkout, which is why the target's own time is not compared.

Operations and waits are counted as if all tensors lay on one device. Of EAGLE's, the mask and the paths of a tree are made on the CPU:
on a GPU those operations launch no kernel, and three of its waits (`max_depth.item()` and two `tolist()`) cost nothing.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from eagle_checkout import EagleReference, adaptations, checkout_hash, load_checkout

from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.prompts import encode_context, encode_first_turn, read_prompts
from coral_hf.evaluation.demo_run import PROMPTS
from coral_hf.evaluation.environment import describe_drafter, describe_environment, describe_target
from coral_hf.evaluation.methods import measure
from coral_hf.evaluation.operation_counts import OperationCounter, count_step, counts_per_step
from coral_hf.evaluation.step_parts import wrapped_parts
from coral_hf.utils.hardware import synchronized_clock


_WARM_UP = 8  # tokens


@dataclass
class ScriptArguments:
    checkout: str = field(metadata={"help": "Folder of a checkout of EAGLE's repository."})
    drafter: str = field(default=DEMO, metadata={"help": "Folder or Hub id of a drafter, or 'demo'."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    data: list[str] = field(
        default_factory=list, metadata={"help": "Prompts; first turns are answered (default: the demo's)."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of both models."})
    device: str = field(default="cpu", metadata={"help": "Where both run."})
    limit: int = field(default=10, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of each answer."})
    depth: int = field(default=6, metadata={"help": "Levels of a tree."})
    top_k: int = field(default=10, metadata={"help": "Branches per node, and nodes expanded per level."})
    total_tokens: int = field(default=60, metadata={"help": "Nodes verified, the root included."})
    repeats: int = field(default=3, metadata={"help": "Times that each answer is timed; the fastest counts."})
    wall: bool = field(default=True, metadata={"help": "Also record times by the clock; not beside other work."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


class StepClock:
    """Seconds within the target's forward and in all, from an answer's first draft on.

    Args:
        now (`Callable`): a clock.
    """

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.began: float | None = None
        self.inside, self.forwards = 0.0, 0

    def wrap(self, function: Callable, part: str) -> Callable:
        """For `wrapped_parts`."""

        @wraps(function)  # generation reads the forward's signature
        def run(*args: Any, **kwargs: Any) -> Any:
            if part == "draft" and self.began is None:
                self.began = self.now()
            if part != "target_forward" or self.began is None:
                return function(*args, **kwargs)
            start = self.now()
            result = function(*args, **kwargs)
            self.inside += self.now() - start
            self.forwards += 1
            return result

        return run

    def outside(self) -> float:
        """Seconds so far that were not within the target's forward."""
        return 0.0 if self.began is None else self.now() - self.began - self.inside


@contextmanager
def eagle_parts(eagle: EagleReference, wrap: Callable[[Callable, str], Callable]) -> Iterator[None]:
    """`wrapped_parts` of EAGLE's loop; what its target's forward contains is the same, LM head included."""
    parts = (
        (eagle.model, "forward", "target_forward"),
        (eagle.model.ea_layer, "topK_genrate", "draft"),
        (eagle.ea_model, "tree_decoding", "verify"),
        (eagle.ea_model, "evaluate_posterior", "acceptance"),
        (eagle.ea_model, "update_inference_inputs", "compaction"),
    )
    with ExitStack() as stack:
        for owner, attribute, part in parts:
            stack.enter_context(patch.object(owner, attribute, wrap(getattr(owner, attribute), part)))
        yield


def count_eagle(eagle: EagleReference, prompts: list[torch.Tensor], new_tokens: int) -> dict[str, Any]:
    """`count_step` of EAGLE's loop."""
    eagle.answer(prompts[0], _WARM_UP)
    pooled: dict[str, Counter] = defaultdict(Counter)
    steps = 0
    for ids in prompts:
        counter = OperationCounter(drafts=True)
        with eagle_parts(eagle, counter.wrap), counter.counting():
            eagle.answer(ids, new_tokens)
        steps += counter.forwards - 1
        for phase, counts in counter.counts.items():
            pooled[phase].update(counts)
    return counts_per_step(pooled, steps, len(prompts) * (new_tokens - 1))


def seconds_outside(
    parts: Callable[[Callable], Any], answer: Callable[[], Any], now: Callable[[], float], repeats: int
) -> float:
    """Seconds of an answer outside of the target's forward, the least of several; `parts` wraps what a step consists of."""
    found = []
    for _ in range(repeats):
        clock = StepClock(now)
        with parts(clock.wrap):
            answer()
            found.append(clock.outside())
    return min(found)


def compare(
    target: Any,
    drafter: Any,
    eagle: EagleReference,
    prompts: list[torch.Tensor],
    new_tokens: int,
    tree: dict[str, Any],
    repeats: int = 1,
    wall: bool = False,
) -> dict[str, Any]:
    """`identical` answers (their last tokens aside), and for `coral` and `eagle` the counts and times of a step.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), eagle ([`EagleReference`])
        prompts (`list[torch.LongTensor]`): ids `[1, L]`.
        new_tokens (`int`): of each answer; at least 3.
        tree (`dict`): CORAL's settings.
        repeats (`int`), wall (`bool`): see the script's options.
    """
    clocks = {"cpu_milliseconds": time.process_time}
    if wall:
        clocks["milliseconds"] = lambda: synchronized_clock([target.device])

    def ours(ids: torch.Tensor) -> list[int]:
        return measure(target, ids, new_tokens, drafter, **tree).new_ids

    def our_parts(wrap: Callable) -> Any:
        return wrapped_parts(target, drafter, wrap, {"target_forward", "draft"})

    rows = {
        "coral": count_step(target, drafter, prompts, new_tokens, **tree),
        "eagle": count_eagle(eagle, prompts, new_tokens),
    }
    identical = sum(ours(ids)[:-1] == eagle.answer(ids, new_tokens)[0] for ids in prompts)
    for key, now in clocks.items():
        spent = dict.fromkeys(rows, 0.0)
        for ids in prompts:
            spent["coral"] += seconds_outside(our_parts, partial(ours, ids), now, repeats)
            theirs = partial(eagle_parts, eagle)
            spent["eagle"] += seconds_outside(theirs, partial(eagle.answer, ids, new_tokens), now, repeats)
        for name, row in rows.items():
            row[f"{key}_outside"] = round(1e3 * spent[name] / row["steps"], 2)
    return {"identical": identical, "methods": rows}


def main() -> None:
    (args,) = parse_script(ScriptArguments)
    if args.max_new_tokens < 3:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} must be at least 3: EAGLE keeps an answer's last token."
        )
    if args.json is not None:
        check_output_file(args.json)
    ea_model = load_checkout(args.checkout)
    torch.set_num_threads(args.threads)
    texts = read_prompts(args.data, args.limit) if args.data else None
    drafter = load_drafter(args.drafter)
    target, tokenizer = load_target(args.target, args.dtype, args.device)
    drafter.to(device=target.device, dtype=target.dtype)
    target.generation_config.eos_token_id = None
    if texts is None:
        prompts = [encode_context(tokenizer, [text]) for text in PROMPTS[: args.limit]]
    else:
        prompts = [encode_first_turn(tokenizer, prompt) for prompt in texts]
    prompts = [ids.to(target.device) for ids in prompts]
    longest = max(ids.shape[1] for ids in prompts) + args.max_new_tokens
    sizes = {"draft_depth": args.depth, "draft_top_k": args.top_k, "draft_total_tokens": args.total_tokens}
    tree = {**sizes, "draft_cost_aware": False, "draft_lookup": False}
    eagle = EagleReference(ea_model, target, drafter, args.depth, args.top_k, args.total_tokens, longest)
    record = {
        "environment": describe_environment(target.device, target.dtype),
        "eagle_sha256": checkout_hash(args.checkout),
        "adapted": adaptations(drafter.config),
        **describe_target(target),
        **describe_drafter(drafter),
        "n_prompts": len(prompts),
        "new_tokens": args.max_new_tokens,
        **sizes,
        **compare(target, drafter, eagle, prompts, args.max_new_tokens, tree, args.repeats, args.wall),
    }
    print(json.dumps(record, indent=1))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
