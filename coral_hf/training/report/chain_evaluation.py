"""The evaluation loop that the trainers of drafters and of parts of their heads share."""

import copy
import time
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from ...data.dataset import ConversationDataset, check_ids, check_lengths
from ..training_rows import encode_dataset
from .simulation import ChainStatistics


class EvaluationMixin(Trainer):
    """Evaluates every row exactly once on any number of processes. Must precede [`~transformers.Trainer`] in the bases.

    A subclass defines the sums (`_start_evaluation`) and the contribution of a batch (`_evaluate_batch`).
    """

    adapter: Any
    tokens_seen: Any
    control: Any
    _kept_loaders: dict[str | None, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._kept_loaders = {}  # by the name of a set

    def _start_evaluation(self) -> Any:
        """Returns an accumulator. Its `drain(accelerator)` returns the values over all processes."""
        raise NotImplementedError

    def _evaluate_batch(self, totals: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Simulates the drafter over the evaluation set, over all steps of a chain of `eval_chain_depth`.

        Args:
            eval_dataset (*optional*): as for the trainer, or the name of one of its sets; by default the trainer's own. All
                sets of a `dict` are evaluated, with values named `{prefix}_{name}_...`.
            ignore_keys: unused.
            metric_key_prefix (`str`): prefix of every name.

        Returns:
            `dict`: of a drafter, `{prefix}_loss` (cross-entropy of step 1 with the exact head), `{prefix}_acceptance_k`
            (conditional, per depth) and `{prefix}_acceptance_length` (tau, pooled, bonus token included); of a part of the head,
            loss, recall and uncovered mass, pooled over the rows of all steps. `{prefix}_runtime` and so on as of `Trainer`.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            metrics: dict[str, float] = {}
            for name, part in rows.items():
                given = name if eval_dataset is None else part
                metrics |= self.evaluate(given, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        name = "" if eval_dataset is None else None  # the name among the trainer's own sets
        if isinstance(rows, str):
            name, rows = rows, self._named_set(rows)
        self._memory_tracker.start()
        dataset = encode_dataset(rows, self.processing_class, self.args)
        if dataset is None:
            raise ValueError("There is no data to evaluate on: give an eval_dataset.")
        check_ids(dataset, self.adapter.vocab_size)
        check_lengths(dataset, getattr(self.adapter.text_config, "max_position_embeddings", None))
        count, batch = len(dataset), self.args.eval_batch_size * self.args.world_size
        if self.args.world_size > 1:
            dataset = even_rows(dataset, batch)
        model: Any = self._wrap_model(self.model, training=False)
        if self.is_fsdp_enabled and self.model is self.model_wrapped:
            self.model.to(self.args.device)  # not sharded yet, so `Trainer` has not moved it
        was_training = self.model.training
        model.eval()
        totals = self._start_evaluation()
        self.callback_handler.eval_dataloader = loader = self._loader(dataset, name)
        start = time.time()
        for inputs in loader:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                self._evaluate_batch(totals, model, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        values = totals.drain(self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=count, num_steps=-(-count // batch))
        metrics[f"{metric_key_prefix}_response_tokens_seen"] = self.tokens_seen
        self.model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """A sampler that orders rows by length, the longest first.

        `Trainer`'s sampler groups rows by length at random. With persistent workers, each evaluation of a set would then sum
        different batches and round differently.
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        lengths = [len(eval_dataset[index]["input_ids"]) for index in range(len(eval_dataset))]
        return sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def _named_set(self, name: str) -> Any:
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if name not in sets:
            raise ValueError(f"There is no evaluation set {name!r}; eval_dataset names {sorted(sets) or 'none'}.")
        return sets[name]

    def _loader(self, dataset: ConversationDataset, name: str | None) -> Any:
        """A data loader. Each of the trainer's own sets has one with persistent workers.

        `Trainer` would keep a single loader for all sets that are passed as objects.
        """
        if name in self._kept_loaders:
            return self._kept_loaders[name]
        loader = self.get_eval_dataloader(dataset)
        self._eval_dataloaders: dict[str, Any] = {}
        if name is not None and self.args.dataloader_persistent_workers:
            self._kept_loaders[name] = loader
        return loader

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported for a drafter.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A drafter predicts features of its target, which are of no use by themselves. Use evaluate(rows) to measure it on "
            "rows, or `coral-hf benchmark` to measure it in generation."
        )


def even_rows(dataset: ConversationDataset, multiple: int) -> ConversationDataset:
    """A data set that is padded to a multiple of rows, with rows that no loss counts.

    Accelerate would pad the last batches with rows of the first, and sums over processes would count them twice. Without
    padding, some processes would skip forward passes that a sharded model needs on all of them.
    """
    filled = copy.copy(dataset)
    ids, mask = dataset.conversations[0]
    uncounted = (ids, torch.zeros_like(mask))
    filled.conversations = [*dataset.conversations, *[uncounted] * (-len(dataset) % multiple)]
    return filled


class ChainTotals:
    """Accumulates a drafter's loss of step 1 and chain statistics over an evaluation set."""

    def __init__(self, depth: int):
        self.statistics = ChainStatistics(depth)
        self.loss = torch.zeros(2, dtype=torch.float64)  # sum, rows

    def add(self, loss: torch.Tensor, count: int, matches: torch.Tensor, trained: torch.Tensor) -> None:
        """Adds a batch: the mean loss over `count` rows, and the arguments of [`ChainStatistics.add`]."""
        self.loss += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        self.statistics.add(matches, trained)

    def drain(self, accelerator: Any) -> dict[str, float]:
        if accelerator.num_processes > 1:
            self.statistics.reduce(accelerator)
            self.loss = accelerator.reduce(self.loss.to(accelerator.device), "sum").cpu()
        return {"loss": (self.loss[0] / self.loss[1].clamp(min=1)).item(), **self.statistics.summary()}


__all__ = ["ChainTotals", "EvaluationMixin", "even_rows"]
