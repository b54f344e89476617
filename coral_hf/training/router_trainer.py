"""CoralRouterTrainer: the second stage, a drafter's LM-head router on top of a frozen drafter."""

from typing import Any

import torch

from .losses import router_loss, target_group_mass
from .token_clusters import start_from_centroids
from .trainer import CoralTrainer
from .training_rows import encode_dataset


RECALL_AT = (1, 2, 4, 8)  # active groups that recall and uncovered mass are reported for, besides the configured


class CoralRouterTrainer(CoralTrainer):
    """Trains `drafter.router` towards the target's probability mass per group (CORAL section 3.2).

    The drafter itself stays frozen. Its outputs of all K rollout steps take part, because drafting uses them all. Logs
    `recall_n` (the target's argmax is in the router's n best groups) and `uncovered_n` (target mass outside of them).

    Args:
        as for [`CoralTrainer`].

    Raises:
        ValueError: if the drafter has no router.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        if model.router is None:
            raise ValueError(
                "stage='router' trains the router of a trained drafter, and this one has none: call "
                "drafter.add_router(num_groups) (--router-groups) first."
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError("stage='router' trains a small router as it is: leave peft_config out.")
        model.requires_grad_(False)
        model.router.requires_grad_(True)
        super().__init__(model, *args, **kwargs)

    def start_router(self) -> None:
        """Finds the groups of a new clustered router and its starting weights; leaves any other router as it is."""
        if self.model.router.token_order is not None:
            counts = self.train_dataset.response_counts(self.adapter.vocab_size)
            start_from_centroids(self.model.router, self.adapter, counts)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_steps = self.args.rollout_steps_at(self.state.global_step / max(self.state.max_steps, 1))
        loss, count, metrics, outputs = self._router_terms(model, inputs, num_steps)
        if model.training:
            self._metrics.add({name: (value, torch.tensor(count)) for name, value in metrics.items()})
        if num_items_in_batch is not None:
            loss = loss * (count / num_items_in_batch)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _router_terms(self, model, inputs, num_steps: int):
        """Mean loss over all steps' rows, trained rows of step 1, recall and uncovered mass, and the outputs."""
        outputs, targets, trained = self.rollout(model, inputs, num_steps, output_group_logits=True)
        router = self.model.router
        # Every step predicts the same rows: one pass of the target's head serves them all.
        mass, best = target_group_mass(
            targets[trained], self.adapter.logits, router.group_mass, chunk_size=self.args.loss_chunk_size
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
            metrics[f"recall_{count}"] = (active == group[:, None]).any(-1).float().mean()
            metrics[f"uncovered_{count}"] = 1 - mass.gather(1, active).sum(-1).mean().float()
        return loss, int(trained.sum()), metrics, outputs

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss, group recall and uncovered mass over the evaluation set, over all steps of a chain."""
        eval_dataset = encode_dataset(eval_dataset, self.processing_class, self.args)
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        rows = 0
        for inputs in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager():
                loss, count, metrics, _ = self._router_terms(
                    self.model, self._prepare_inputs(inputs), self.args.eval_chain_depth
                )
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * count
            rows += count
        totals = torch.tensor([*sums.values(), rows], dtype=torch.float64, device=self.args.device)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, "sum")
        values = (totals[:-1] / totals[-1].clamp(min=1)).tolist()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in zip(sums, values, strict=True)}
        metrics[f"{metric_key_prefix}_response_tokens_seen"] = self.tokens_seen
        self.model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


__all__ = ["CoralRouterTrainer"]
