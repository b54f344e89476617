"""Measures drafters: simulated chains over the target's own answers, and trees in real generation."""

from typing import Any

import torch

from coral_hf import coral_generate
from coral_hf.data.collator import CoralDataCollator
from coral_hf.data.dataset import ConversationDataset
from coral_hf.generation.statistics import DraftStats
from coral_hf.training.losses.loss_term import LossBatch
from coral_hf.training.report.simulation import ChainStatistics


TREE = {"draft_depth": 5, "draft_top_k": 4, "draft_total_tokens": 16, "draft_cost_aware": False}
_BATCH = 16


@torch.no_grad()
def chains(trainer: Any, rows: list[dict[str, Any]], temperature: float, depth: int) -> dict[str, Any]:
    """A chain of `depth` drafts at each token of answers that the target gave at a temperature of 0 or 1.

    Args:
        trainer ([`CoralTrainer`]), rows (`list[dict]`), depth (`int`)
        temperature (`float`): at 0 a draft is right if it is the target's best token, at 1 if it is the token that the
            target drew, as in our sampled decoding.

    Returns:
        `dict`: `tau` and, for each depth, `acceptance` given that the depths before were accepted. Two further measures count
        every row, regardless of acceptance before it, and vary least: `agreement` is how often both have the same best token,
        and `overlap` is the mean of alpha = sum min(p, q), the acceptance rate of drafts that are drawn from q.
    """
    statistics = ChainStatistics(depth)
    totals = torch.zeros(depth, 3, dtype=torch.float64)  # sums of overlap and agreement, and rows
    dataset, collate = ConversationDataset(rows), CoralDataCollator(0)
    trainer.model.eval()
    for start in range(0, len(dataset), _BATCH):
        inputs = collate([dataset[index] for index in range(start, min(start + _BATCH, len(dataset)))])
        outputs, goals, trained = trainer.rollout(trainer.model, inputs, depth)
        batch = LossBatch.of_rollout(outputs.hidden_states, outputs.valid, goals, trained)
        p = trainer.adapter.logits(batch.goals).softmax(-1)  # [M, V]
        following = torch.zeros_like(trained, dtype=torch.long)
        following[:, :-1] = inputs["input_ids"][:, 2:]
        right = following.flatten()[batch.places] if temperature else p.argmax(-1)  # [M]
        matches = torch.zeros(depth, *trained.shape, dtype=torch.bool)
        for step in range(depth):
            q = trainer.adapter.logits(batch.hidden[step]).softmax(-1)
            live = batch.valid[step]
            best = q.argmax(-1)
            matches[step][trained] = (best == right) & live
            alpha, same = torch.minimum(p, q).sum(-1)[live], (best == p.argmax(-1))[live]
            totals[step] += torch.tensor([float(alpha.sum()), float(same.sum()), len(alpha)], dtype=torch.float64)
        statistics.add(matches, trained)
    summary = statistics.summary()
    return {
        "tau": round(summary["acceptance_length"], 4),
        "acceptance": [round(summary[f"acceptance_{step}"], 4) for step in range(1, depth + 1)],
        "overlap": [round(value, 4) for value in (totals[:, 0] / totals[:, 2]).tolist()],
        "agreement": [round(value, 4) for value in (totals[:, 1] / totals[:, 2]).tolist()],
    }


def trees(trainer: Any, target: Any, rows: list[dict[str, Any]], temperature: float, new_tokens: int) -> float:
    """tau of trees of 16 in `generate` from the rows' prompts, pooled over steps; sampled with one seed."""
    drafter, stats = trainer.model.eval(), DraftStats()
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(0)
    for start in range(0, len(rows), _BATCH):
        ids = torch.tensor([row["prompt_ids"] for row in rows[start : start + _BATCH]])
        coral_generate(
            target,
            drafter,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            **sampling,
            **TREE,
        )
        stats = stats.merge(drafter.last_stats)
    return round(stats.acceptance_length, 4)


__all__ = ["chains", "trees"]
