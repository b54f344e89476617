"""CoralRouterTrainer: the second stage, a drafter's LM-head router on top of a frozen drafter."""

from typing import Any

import torch

from .inputs import resolve_drafter
from .losses.router import router_loss, target_group_mass
from .report.metrics import WeightedMeans
from .token_clusters import start_from_centroids
from .trainer import CoralTrainer


RECALL_AT = (1, 2, 4, 8)  # active groups that recall and uncovered mass are reported for, besides the configured


class CoralRouterTrainer(CoralTrainer):
    """Trains `drafter.router` towards the target's probability mass per group (CORAL section 3.2).

    The drafter itself stays frozen. Its outputs of all K rollout steps take part, because drafting uses them all. Logs
    `recall_n` (the target's argmax is in the router's n best groups) and `uncovered_n` (target mass outside of them).

    Args:
        as for [`CoralTrainer`].

    Raises:
        ValueError: if the drafter has no router, or `args.stage` is not `"router"`.
    """

    stage = "router"

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        model = resolve_drafter(model)
        if model.router is None:
            raise ValueError(
                "stage='router' trains the router of a trained drafter, and this one has none: call "
                "drafter.add_router(num_groups) (--router-groups) first."
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError("stage='router' trains a small router as it is: leave peft_config out.")
        super().__init__(model, *args, **kwargs)

    def start_router(self) -> None:
        """Finds the groups of a new clustered router and its starting weights; leaves any other router as it is."""
        if self.model.router.token_order is not None:
            counts = self.train_dataset.response_counts(self.adapter.vocab_size)
            start_from_centroids(self.model.router, self.adapter, counts)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_steps = self.args.rollout_steps_at(self.state.global_step / max(self.state.max_steps, 1))
        loss, rows, count, metrics, outputs = self._router_terms(model, inputs, num_steps)
        if model.training:
            self._metrics.add({name: (value, rows) for name, value in metrics.items()})
        # A row counts the same in whichever batch it lies: how many of later steps' rows are there differs.
        items = max(count, 1) if num_items_in_batch is None else num_items_in_batch
        loss = self._finish_loss(loss * rows / (num_steps * items), model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _router_terms(self, model, inputs, num_steps: int):
        """Mean loss over all steps' rows, how many those are, trained rows of a step, recall and uncovered mass over all
        steps' rows, and the outputs."""
        outputs, targets, trained = self.rollout(model, inputs, num_steps, output_group_logits=True)
        router = self.model.router
        # Every step predicts the same rows: one pass of the target's head serves them all.
        mass, best = target_group_mass(
            targets[trained], self.adapter.logits, router.group_mass, chunk_size=self._chunk_size
        )
        kept = [valid[trained] for valid in outputs.valid]
        pairs = list(zip(outputs.group_logits, kept, strict=True))
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

    def _start_evaluation(self) -> Any:
        return WeightedMeans(torch.float64)

    def _evaluate_batch(self, totals: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        loss, rows, _, metrics, _ = self._router_terms(model, inputs, self.args.eval_chain_depth)
        totals.add({name: (value, rows) for name, value in {"loss": loss, **metrics}.items()})


__all__ = ["CoralRouterTrainer"]
