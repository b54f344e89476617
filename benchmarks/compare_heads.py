"""How much of the target's probability each draft head leaves uncovered: at equal active rows, and all five at equal cost.

coral-hf regenerate --prompts dev.jsonl --output dev_responses.jsonl --dtype float32 --max_new_tokens 128
python benchmarks/compare_heads.py --drafter outputs/router --responses dev_responses.jsonl --counts responses/ --json FILE

Runs the drafter over the responses (three rollout steps) and reports, for 1/32 to 1/2 of the vocabulary: the mean
target mass outside the active ids (`uncovered`) and how often the target's argmax is inside (`recall`), for the routed
groups, for the most frequent ids counted on other responses, and for half and half of both.

Then the full head, the frequency list, the router, the low-rank head and the in-context list at equal cost, counted in rows of the
head (`head_costs.py`): as much as the drafter's low-rank head costs, or `--budget`. `kept` is the share of the full head's ten
best ids on the drafter's output that a head finds. A drafter without a low-rank head gets the truncated SVD of the target's,
untrained. `benchmark_head.py` times such heads.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from head_costs import groups_within, low_rank_rows, rank_within, router_rows

from coral_hf import TargetAdapter
from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.dataset import ConversationDataset, read_rows
from coral_hf.evaluation.environment import describe_drafter, describe_environment


BEST = 10  # ids of the full head that `kept` asks for: as many branches as a node of EAGLE-2's trees has


@dataclass
class ScriptArguments:
    drafter: str = field(metadata={"help": "Folder of a drafter with a router."})
    responses: list[str] = field(metadata={"help": "Responses to measure on."})
    counts: list[str] = field(metadata={"help": "Responses that token frequencies are counted on."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="float32", metadata={"help": "Of the target; probabilities are compared, not speeds."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    steps: int = field(default=3, metadata={"help": "Rollout steps whose outputs the router sees."})
    budget: int | None = field(
        default=None,
        metadata={
            "help": "Rows of the head that each of the five heads may cost (default: what the drafter's low-rank head costs, or a "
            "sixteenth of the vocabulary)."
        },
    )
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


@dataclass
class Outputs:
    """What the drafter said over all responses, M rows.

    Args:
        hidden (`torch.Tensor` of shape `[M, H]`): the drafter's outputs.
        features (`torch.Tensor` of shape `[M, H]`): the target's features that they predict.
        places (`list[tuple[int, int]]`): of each row, which text it belongs to, and how many of its tokens were known when it
            was drafted.
        texts (`list[list[int]]`)
    """

    hidden: torch.Tensor
    features: torch.Tensor
    places: list[tuple[int, int]]
    texts: list[list[int]]


@torch.no_grad()
def collect(drafter, adapter, dataset, steps: int) -> Outputs:
    """The drafter's outputs of every step."""
    outputs, targets, places, texts = [], [], [], []
    for index in range(len(dataset)):
        item = dataset[index]
        ids, response = (item[name][None].to(adapter.device) for name in ("input_ids", "response_mask"))
        texts.append(ids[0].tolist())
        features = adapter.compute_features(ids).float()
        read = features[:, :-1, : drafter.config.num_target_features * adapter.hidden_size]
        rollout = drafter(adapter.embed(ids[:, 1:]).float(), read, num_steps=steps)
        rows = torch.zeros_like(response[:, 1:])
        rows[:, :-1] = response[:, 2:]
        for step, (hidden, valid) in enumerate(zip(rollout.hidden_states, rollout.valid, strict=True), start=1):
            outputs.append(hidden[rows & valid])
            targets.append(features[:, 1:, -adapter.hidden_size :][rows & valid])
            # row r of step 1 drafts after x_{r+1}; a later step drafts the same token from as many tokens fewer
            places += [(index, row + 3 - step) for row in (rows & valid)[0].nonzero().flatten().tolist()]
    return Outputs(torch.cat(outputs), torch.cat(targets), places, texts)


class Covered:
    """Sums over rows of what each head covers."""

    def __init__(self) -> None:
        self.sums: dict[Any, torch.Tensor] = {}

    def add(self, name: Any, active: torch.Tensor, p: torch.Tensor, wanted: torch.Tensor) -> None:
        """Active ids `[C, V]` (bool), the target's probabilities `[C, V]`, and the full head's best ids `[C, BEST]`."""
        found = active.gather(1, p.argmax(-1, keepdim=True)).float().sum()
        kept = active.gather(1, wanted).float().mean(-1).sum()
        sums = torch.stack([(p * active).sum(-1).sum(), found, kept]).double().cpu()
        self.sums[name] = self.sums.get(name, 0) + sums

    def means(self, name: Any, rows: int) -> dict[str, float]:
        covered, found, kept = (self.sums[name] / rows).tolist()
        return {"uncovered": 1 - covered, "recall": found, "kept": kept}


def text_lists(
    outputs: Outputs, start: int, count: int, by_frequency: torch.Tensor, size: int
) -> Iterator[torch.Tensor]:
    """For each of `count` rows from `start`: the latest ids of its text so far, filled up to `size` by the most frequent ones."""
    for index, known in outputs.places[start : start + count]:
        latest = list(dict.fromkeys(reversed(outputs.texts[index][:known])))[:size]
        active = torch.zeros(len(by_frequency), dtype=torch.bool)
        active[latest] = True
        rest = by_frequency[~active[by_frequency]][: size - len(latest)]
        active[rest] = True
        yield active


def equal_cost(outputs: Outputs, drafter: Any, adapter: TargetAdapter, by_frequency: torch.Tensor, budget: int | None):
    """Coverage of all five heads that cost as much as the low-rank head, and its sizes."""
    vocab_size, size = adapter.vocab_size, adapter.hidden_size
    router, trained = drafter.router, drafter.low_rank is not None and budget is None
    candidates = drafter.config.low_rank_candidates or min(64, vocab_size)
    if not trained:
        asked = vocab_size // 16 if budget is None else budget
        drafter.add_low_rank_head(adapter.target, rank_within(asked, candidates, vocab_size, size), candidates)
    rank = drafter.config.low_rank_size
    cost = low_rank_rows(rank, candidates, vocab_size, size)
    listed, active = min(vocab_size, round(cost)), groups_within(cost, router, size)
    group_of = router.groups_of(torch.arange(vocab_size, device=adapter.device))
    most_frequent = torch.zeros(vocab_size, dtype=torch.bool, device=adapter.device)
    most_frequent[by_frequency[:listed].to(adapter.device)] = True
    covered = Covered()
    for start in range(0, len(outputs.hidden), 256):
        chunk = outputs.hidden[start : start + 256]
        p = adapter.logits(outputs.features[start : start + 256]).float().softmax(-1)
        wanted = adapter.logits(chunk).float().topk(min(BEST, vocab_size)).indices
        estimate = drafter.low_rank.logits(chunk, adapter)
        everything = torch.ones_like(p, dtype=torch.bool)
        masks = {
            "full": everything,
            "shortlist": most_frequent.expand_as(p),
            "router": router(chunk).argsort(-1, descending=True).argsort(-1)[:, group_of] < active,
            "low_rank": ~everything.scatter(1, estimate.topk(candidates).indices, False),
            "context": torch.stack(list(text_lists(outputs, start, len(chunk), by_frequency, listed))).to(p.device),
        }
        for name, mask in masks.items():
            covered.add(name, mask, p, wanted)
    rows = {
        "full": {"cost_rows": vocab_size},
        "shortlist": {"cost_rows": listed},
        "router": {"cost_rows": router_rows(router, size) + active * router.group_size, "active_groups": active},
        "low_rank": {"cost_rows": cost, "rank": rank, "candidates": candidates, "trained": trained},
        "context": {"cost_rows": listed},
    }
    return [{"head": name, **sizes, **covered.means(name, len(outputs.hidden))} for name, sizes in rows.items()]


@torch.no_grad()
def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    if script.budget is not None and script.budget < 1:
        raise ValueError(f"--budget {script.budget} must be at least 1 row of the head.")
    torch.set_num_threads(script.threads)
    target, _ = load_target(script.target, script.dtype, script.device)
    drafter = load_drafter(script.drafter).float().to(target.device)
    layers = drafter.config.target_feature_layers  # the last layer's feature, which is predicted, comes last
    adapter, router = TargetAdapter(target, layers if layers[-1] == -1 else [*layers, -1]), drafter.router
    if router is None:
        raise ValueError(f"--drafter {script.drafter} has no router; train one with coral-hf train --stage router.")
    vocab_size = adapter.vocab_size
    counts = ConversationDataset(read_rows(script.counts), None, 2048).response_counts(vocab_size)
    by_frequency = counts.argsort(descending=True, stable=True)
    rank = by_frequency.argsort().to(target.device)
    outputs = collect(drafter, adapter, ConversationDataset(read_rows(script.responses), None, 2048), script.steps)
    group_of = router.groups_of(torch.arange(vocab_size, device=target.device))
    covered = Covered()
    for chunk, target_chunk in zip(outputs.hidden.split(256), outputs.features.split(256), strict=True):
        p = adapter.logits(target_chunk).float().softmax(-1)
        wanted = adapter.logits(chunk).float().topk(min(BEST, vocab_size)).indices
        place = router(chunk).argsort(-1, descending=True).argsort(-1)[:, group_of]  # [C, V]: its group's rank
        for share in (32, 16, 8, 4, 2):
            groups, size = max(1, router.num_groups // share), vocab_size // share
            active = {"router": place < groups, "list": (rank < size).expand_as(p)}
            # the routed half may name ids of the list again: count only what is computed once
            active["both"] = (place < max(1, groups // 2)) | (rank < size // 2)
            for name, mask in active.items():
                covered.add((name, share), mask, p, wanted)
    count = len(outputs.hidden)
    rows = [
        {"head": name, "active_share": 1 / share, **covered.means((name, share), count)}
        for name, share in covered.sums
    ]
    described = describe_drafter(drafter)  # before it may get a low-rank head
    same_cost = equal_cost(outputs, drafter, adapter, by_frequency, script.budget)
    for row in (*rows, *same_cost):
        size = f"{row['active_share']:.4f}" if "active_share" in row else f"{row['cost_rows']:.0f} rows"
        print(
            f"{row['head']:>9} {size} uncovered {row['uncovered']:.4f} recall {row['recall']:.4f} kept {row['kept']:.4f}"
        )
    if script.json is not None:
        record = {"environment": describe_environment(target.device, target.dtype), "rows_measured": count}
        record |= {"router_groups": router.num_groups, "router_grouping": drafter.config.router_grouping}
        # the MLP's multiplications as this many rows of the head, on top of the active ones
        record |= {"router_mlp_rows": router_rows(router, adapter.hidden_size), "steps": script.steps}
        record |= {"curve": rows, "equal_cost": same_cost, **described}
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
