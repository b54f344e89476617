"""CoralLowRankTrainer: trains the low-rank head of a frozen drafter."""

from typing import Any

import torch

from .head_trainer import HeadTrainer
from .losses.low_rank import low_rank_loss


class CoralLowRankTrainer(HeadTrainer):
    """Trains `drafter.low_rank` towards the distribution of the target's full head on the drafter's outputs (EAGLE-4).

    The drafter itself stays frozen. Its outputs of all K rollout steps are used, as in drafting. With n candidates, logs
    `recall_n` (how often the full head's likeliest id is a candidate) and `uncovered_n` (the full head's probability of all
    other ids).

    Args:
        the same as for [`CoralTrainer`].

    Raises:
        ValueError: if the drafter has no low-rank head, or `args.stage` is not `"low_rank"`.
    """

    stage = "low_rank"
    part = "low-rank head"
    remedy = "drafter.add_low_rank_head(target, rank) (--low-rank-size)"

    def _head_terms(self, model, inputs, num_steps):
        trained = self.trained_rows(inputs)
        candidates = self.model.config.low_rank_candidates

        def scorer(drafter: Any, outputs: Any) -> tuple[torch.Tensor, ...]:
            rows = [
                hidden[trained & valid] for hidden, valid in zip(outputs.hidden_states, outputs.valid, strict=True)
            ]
            head = drafter.low_rank
            return low_rank_loss(
                torch.cat(rows),
                self.adapter.logits,
                lambda hidden: head.logits(hidden, self.adapter),
                [head.down_proj.weight, head.up_proj.weight],
                candidates,
                chunk_size=self._chunk_size,
            )

        outputs, *_ = self.rollout(model, inputs, num_steps, scorer)
        loss, recall, uncovered = outputs.scores
        metrics = {f"recall_{candidates}": recall, f"uncovered_{candidates}": uncovered}
        rows = sum(int((trained & valid).sum()) for valid in outputs.valid)
        return loss, rows, int(trained.sum()), metrics, outputs


__all__ = ["CoralLowRankTrainer"]
