"""How much of the target's probability a router or a frequency shortlist leaves uncovered, at equal active rows.

coral-hf regenerate --prompts dev.jsonl --output dev_responses.jsonl --dtype float32 --max_new_tokens 128
python benchmarks/compare_heads.py --drafter outputs/router --responses dev_responses.jsonl --counts responses/ --json FILE

Runs the drafter over the responses (three rollout steps) and reports, for 1/32 to 1/2 of the vocabulary: the mean
target mass outside the active ids (`uncovered`) and how often the target's argmax is inside (`recall`), for the routed
groups, for the most frequent ids counted on other responses, and for half and half of both.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coral_hf import TargetAdapter
from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.dataset import ConversationDataset, read_rows
from coral_hf.evaluation.environment import describe_drafter, describe_environment


@dataclass
class ScriptArguments:
    drafter: str = field(metadata={"help": "Folder of a drafter with a router."})
    responses: list[str] = field(metadata={"help": "Responses to measure on."})
    counts: list[str] = field(metadata={"help": "Responses that token frequencies are counted on."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="float32", metadata={"help": "Of the target; probabilities are compared, not speeds."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    steps: int = field(default=3, metadata={"help": "Rollout steps whose outputs the router sees."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


@torch.no_grad()
def collect(drafter, adapter, dataset, steps: int):
    """Drafter outputs `[M, H]` of every step and the target's features `[M, H]` that they predict."""
    outputs, targets = [], []
    for index in range(len(dataset)):
        item = dataset[index]
        ids, response = (item[name][None].to(adapter.device) for name in ("input_ids", "response_mask"))
        features = adapter.compute_features(ids).float()
        read = features[:, :-1, : drafter.config.num_target_features * adapter.hidden_size]
        rollout = drafter(adapter.embed(ids[:, 1:]).float(), read, num_steps=steps)
        rows = torch.zeros_like(response[:, 1:])
        rows[:, :-1] = response[:, 2:]
        for hidden, valid in zip(rollout.hidden_states, rollout.valid, strict=True):
            outputs.append(hidden[rows & valid])
            targets.append(features[:, 1:, -adapter.hidden_size :][rows & valid])
    return torch.cat(outputs), torch.cat(targets)


@torch.no_grad()
def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    torch.set_num_threads(script.threads)
    target, _ = load_target(script.target, script.dtype, script.device)
    drafter = load_drafter(script.drafter).float().to(target.device)
    layers = drafter.config.target_feature_layers  # the last layer's feature, which is predicted, comes last
    adapter, router = TargetAdapter(target, layers if layers[-1] == -1 else [*layers, -1]), drafter.router
    if router is None:
        raise ValueError(f"--drafter {script.drafter} has no router; train one with coral-hf train --stage router.")
    vocab_size = adapter.vocab_size
    counts = ConversationDataset(read_rows(script.counts), None, 2048).response_counts(vocab_size)
    rank = counts.argsort(descending=True, stable=True).argsort().to(target.device)
    hidden, features = collect(
        drafter, adapter, ConversationDataset(read_rows(script.responses), None, 2048), script.steps
    )
    group_of = router.groups_of(torch.arange(vocab_size, device=target.device))
    sums: dict[tuple[str, int], torch.Tensor] = {}
    for chunk, target_chunk in zip(hidden.split(256), features.split(256), strict=True):
        p = adapter.logits(target_chunk).float().softmax(-1)
        best = p.argmax(-1, keepdim=True)
        place = router(chunk).argsort(-1, descending=True).argsort(-1)[:, group_of]  # [C, V]: its group's rank
        for share in (32, 16, 8, 4, 2):
            groups, size = max(1, router.num_groups // share), vocab_size // share
            active = {"router": place < groups, "list": (rank < size).expand_as(p)}
            # the routed half may name ids of the list again: count only what is computed once
            active["both"] = (place < max(1, groups // 2)) | (rank < size // 2)
            for name, mask in active.items():
                covered, found = (p * mask).sum(-1).sum(), mask.gather(1, best).float().sum()
                sums[name, share] = sums.get((name, share), torch.zeros(2)) + torch.stack([covered, found]).cpu()
    rows = [
        {"head": name, "active_share": 1 / share, "uncovered": 1 - (total[0] / len(hidden)).item()}
        | {"recall": (total[1] / len(hidden)).item()}
        for (name, share), total in sums.items()
    ]
    for row in rows:
        print(
            f"{row['head']:>7} {row['active_share']:.4f} uncovered {row['uncovered']:.4f} recall {row['recall']:.4f}"
        )
    if script.json is not None:
        record = {"environment": describe_environment(target.device, target.dtype), "rows_measured": len(hidden)}
        record |= {"router_groups": router.num_groups, "router_grouping": drafter.config.router_grouping}
        # the MLP's multiplications as this many rows of the head, on top of the active ones
        mlp = (router.up_proj.weight.numel() + router.down_proj.weight.numel()) / adapter.hidden_size
        record |= {"router_mlp_rows": mlp, "steps": script.steps, "curve": rows}
        record |= describe_drafter(drafter)
        Path(script.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
