"""CoralRouterTrainer: the second stage, which trains the LM-head router of a frozen drafter."""

from typing import Any

import torch

from .head_trainer import HeadTrainer
from .losses.router import router_loss, target_group_mass
from .token_clusters import start_from_centroids


RECALL_AT = (1, 2, 4, 8)  # numbers of active groups to report, besides the configured one


class CoralRouterTrainer(HeadTrainer):
    """Trains `drafter.router` towards the target's probability mass per group (CORAL section 3.2).

    The drafter itself stays frozen. Its outputs of all K rollout steps are used, as in drafting. Logs `recall_n` (how often
    the target's argmax is in the router's n best groups) and `uncovered_n` (the target's mass outside of them).

    Args:
        the same as for [`CoralTrainer`].

    Raises:
        ValueError: if the drafter has no router, or `args.stage` is not `"router"`.
    """

    stage = "router"
    part = "router"
    remedy = "drafter.add_router(num_groups) (--router-groups)"

    def start_router(self) -> None:
        """Computes groups and initial weights of a new clustered router. Other routers stay unchanged."""
        if self.model.router.token_order is not None:
            counts = self.train_dataset.response_counts(self.adapter.vocab_size)
            start_from_centroids(self.model.router, self.adapter, counts)

    def _head_terms(self, model, inputs, num_steps):
        outputs, targets, trained = self.rollout(model, inputs, num_steps, _group_logits)
        router = self.model.router
        # Every step predicts the same rows, so one pass of the target's head is enough.
        mass, best = target_group_mass(
            targets[trained], self.adapter.logits, router.group_mass, chunk_size=self._chunk_size
        )
        kept = [valid[trained] for valid in outputs.valid]
        pairs = list(zip(outputs.scores, kept, strict=True))
        group_logits = torch.cat([logits[trained][rows] for logits, rows in pairs])
        mass, best = torch.cat([mass[rows] for rows in kept]), torch.cat([best[rows] for rows in kept])
        loss = router_loss(group_logits, mass)
        metrics, group = {}, router.groups_of(best)
        order = group_logits.detach().argsort(dim=-1, descending=True)
        for count in sorted(
            {*(n for n in RECALL_AT if n <= router.num_groups), self.model.config.router_active_groups}
        ):
            active = order[:, :count]
            # sums, because the mean over a batch without rows is NaN
            found, covered = (active == group[:, None]).any(-1).sum(), mass.gather(1, active).sum()
            metrics[f"recall_{count}"] = found.float() / max(len(mass), 1)
            metrics[f"uncovered_{count}"] = 1 - covered.float() / max(len(mass), 1)
        return loss, len(mass), int(trained.sum()), metrics, outputs


def _group_logits(drafter: Any, outputs: Any) -> tuple[torch.Tensor, ...]:
    """The router's logits `[B, S, G]` of every step."""
    return tuple(drafter.router(hidden) for hidden in outputs.hidden_states)


__all__ = ["CoralRouterTrainer"]
