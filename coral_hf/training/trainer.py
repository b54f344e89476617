"""CoralTrainer: trains a drafter against a frozen target that computes features in the same process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..data.chat import with_template_kwargs
from ..data.collator import IGNORED_LABEL, CoralDataCollator
from ..data.dataset import check_ids, check_lengths, preview
from ..drafter.configuration_coral import check_vocabulary
from ..drafter.hub_names import public_name
from ..drafter.modeling_coral import CoralDraftModel
from ..drafter.target_adapter import TargetAdapter
from ..utils.compat import hidden_states_to_ask
from .feature_cache import FeatureCache
from .inputs import is_name, resolve_arguments, resolve_models
from .losses.chunked_pass import Comparison, PassResult, chunked_pass
from .losses.classification import cross_entropy
from .losses.loss_term import LossBatch
from .losses.loss_tokens import LossTokens
from .losses.terms import comparisons, weighted_sum
from .recipe import settle_arguments
from .report.chain_evaluation import ChainTotals, EvaluationMixin
from .report.learning_curve import DrawLearningCurve
from .report.metrics import CountTokens, WeightedMeans, chain_length
from .report.simulation import conditional_acceptance
from .run.adapters import add_adapters
from .run.checkpoints import CheckpointMixin
from .run.faults import StopOnNonFiniteGradient
from .run.placement import check_devices, check_packing, end_processes, place_target, plain_sharding
from .run.publishing import PublishingMixin
from .run.stages import train_in_float32, train_stage
from .run.unused_settings import check_parameters
from .training_rows import encode_dataset, encode_training_dataset, first_item, template_kwargs


class CoralTrainer(PublishingMixin, CheckpointMixin, EvaluationMixin, Trainer):
    """Trains a [`CoralDraftModel`] with a K-step rollout (HASS), the classification and regression losses of EAGLE and
    CSRA (CORAL section 3).

    Args:
        model ([`CoralDraftModel`] or `str`): the drafter, or its path or Hub id. A drafter in float16 or bfloat16 is cast to
            float32, and trained and saved in float32. To save it in bfloat16 afterwards, use
            `drafter.to(torch.bfloat16).save_pretrained(folder)`.
        target_model (`PreTrainedModel` or `str`): the frozen target, which is never saved or trained; or its path or Hub id,
            to load it and its tokenizer in the checkpoint's dtype.
        args ([`CoralTrainingArguments`]): the arguments. From plain `TrainingArguments`, non-default values are used.
        train_dataset, eval_dataset: a [`ConversationDataset`], anything that [`read_rows`] reads (a path, a Hub id, a
            DataFrame), a `datasets.Dataset`, or a list of training rows (see [`encode_row`]). `eval_dataset` may also be a
            `dict` of these. Rows without a length (`RowStream`, `datasets.IterableDataset`) are streamed in training, which
            needs `max_steps`, and read completely for evaluation.
        processing_class (*optional*): the target's tokenizer. Its vocabulary hash must equal the drafter's.
        peft_config (`PeftConfig`, *optional*): adapts the drafter to this (fine-tuned) target with adapters instead of
            training it. `save_model` and `push_to_hub` write the merged drafter, and the adapters next to it.
        **kwargs: as for [`~transformers.Trainer`], except for functions that would not be called (`compute_metrics`, ...).

    Raises:
        ValueError: if drafter, target and tokenizer do not belong together, no response token is left, one process would
            train on several GPUs, or `args.stage` belongs to another trainer.
    """

    model_accepts_loss_kwargs = True
    loss_is_scaled_for_ga = (
        True  # by num_items_in_batch, in compute_loss (Transformers 5.24 asks subclasses to say so)
    )
    stage = "drafter"
    _signature_columns: list[str] | None
    control: Any

    def __init__(
        self,
        model: Any,
        target_model: PreTrainedModel | str,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        check_parameters(kwargs)
        args = resolve_arguments(args, self.stage)
        if is_name(train_dataset):
            self.data_names = [str(train_dataset)]
        model, target_model, processing_class = resolve_models(model, target_model, processing_class)
        if args.stage != self.stage:
            raise ValueError(
                f"stage={args.stage!r}, but {type(self).__name__} trains stage {self.stage!r}: CoralTrainer is for the drafter, "
                "CoralRouterTrainer for its router, CoralLowRankTrainer for its low-rank head."
            )
        check_devices(args)
        if model.config.draft_vocab_size is not None:
            raise ValueError(
                f"This drafter has its own LM head (draft_vocab_size={model.config.draft_vocab_size}), which the trainer does "
                "not train. Train a drafter that uses the target's head."
            )
        self.target_model = target_model.requires_grad_(False).eval()
        # The losses need the last layer's feature even if the drafter does not read it. It always comes last.
        layers = model.config.target_feature_layers
        self.adapter = TargetAdapter(target_model, layers if layers[-1] == -1 else [*layers, -1])
        self.adapter.output_hidden_states = hidden_states_to_ask(self.adapter.target, self.adapter.feature_layers)
        self._features_read = len(layers) * self.adapter.hidden_size
        check_pair(model, self.adapter, processing_class)
        train_in_float32(model, say=args.process_index == 0)
        train_stage(model, self.stage, say=args.process_index == 0)
        if peft_config is not None:
            set_seed(args.seed)  # `Trainer` sets the seed after the adapters are drawn
            model = add_adapters(model, peft_config, self.adapter)
        if args.packing:
            check_packing(self.adapter)
        positions = getattr(self.adapter.text_config, "max_position_embeddings", None)
        eval_sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        tokenizer = processing_class and with_template_kwargs(processing_class, args.chat_template_kwargs)
        eval_sets = {name: encode_dataset(rows, tokenizer, args, target_model) for name, rows in eval_sets.items()}
        eval_dataset = eval_sets if isinstance(eval_dataset, dict) else eval_sets[""]
        conversations, train_dataset = encode_training_dataset(
            train_dataset, tokenizer, args, self.adapter.vocab_size, positions, target_model
        )
        for dataset in (conversations, *eval_sets.values()):
            check_ids(dataset, self.adapter.vocab_size)
            check_lengths(dataset, positions)
        self.chosen = settle_arguments(args, model, self.adapter, conversations, train_dataset)
        collator = kwargs.pop("data_collator", None) or CoralDataCollator(self._pad_token_id(processing_class))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # `Trainer` infers this from the model's forward. Here, compute_loss scales the loss by num_items_in_batch.
        self.model_accepts_loss_kwargs = True
        place_target(self.adapter, self.accelerator, args.shard_target)
        self.adapter.check_identity()
        self._finite = StopOnNonFiniteGradient()
        self.add_callback(self._finite)
        if args.learning_curve:
            self.add_callback(DrawLearningCurve())
        self._metrics = WeightedMeans()
        self._chunk_size = args.loss_chunk_size
        self._loss_tokens = LossTokens(args, self.train_dataset, self.adapter.vocab_size)
        self._tokens = CountTokens()
        self.add_callback(self._tokens)
        if args.cache_features is not None:
            self._fill_cache(args.cache_features, [conversations, *eval_sets.values()])
        if train_dataset is not None:
            first_item(train_dataset)  # for a stream, this reads its first item
            model.config.chat_template_kwargs = template_kwargs(train_dataset, args)
        if processing_class is not None and train_dataset is not None and self.is_world_process_zero():
            sample = preview(first_item(train_dataset), processing_class)
            print(f"First sample, trained tokens between ⟦ and ⟧:\n{sample}")

    @staticmethod
    def _pad_token_id(tokenizer: Any) -> int:
        return getattr(tokenizer, "pad_token_id", None) or 0

    @property
    def tokens_seen(self) -> int:
        """Response tokens trained on, over all processes."""
        return self._tokens.seen

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plain_sharding(self.accelerator)

    def _fill_cache(self, directory: str, datasets: Sequence[Any]) -> None:
        name = public_name(self.model.config.target_name_or_path)  # a folder may move
        cache = FeatureCache(directory, self.adapter, f"{name} {self.target_revision}")
        rows = [dataset[i]["input_ids"] for dataset in datasets if dataset is not None for i in range(len(dataset))]
        wait = self.accelerator.wait_for_everyone
        cache.fill(rows, rank=self.args.process_index, world_size=self.args.world_size, barrier=wait)
        wait()
        cache.refresh()  # find what the other processes wrote
        self.data_collator.feature_cache = cache

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "response_mask", "lengths"]

    def end_training(self) -> None:
        """Lets all processes of a run exit together. Call it last in a script for several processes."""
        end_processes(self)

    # One batch -------------------------------------------------------------------------------------------------

    def rollout(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_steps: int,
        scorer: Callable[..., Any] | None = None,
    ):
        """Runs target (unless features are cached) and drafter over a batch.

        Args:
            model (`nn.Module`): the drafter, possibly wrapped.
            inputs: see [`CoralDataCollator`].
            num_steps (`int`): K.
            scorer (`Callable`, *optional*): see [`CoralDraftModel.forward`].

        Returns:
            `tuple`: [`CoralRolloutOutput`]; target features `[B, S-1, H]` that row r must predict; and the rows that
            count in step 1, `torch.BoolTensor` of shape `[B, S-1]`.
        """
        ids, documents = inputs["input_ids"], inputs["document_ids"]
        features, positions = inputs.get("features"), inputs.get("position_ids")
        with torch.autocast(ids.device.type, enabled=False), torch.no_grad():
            if features is None:
                # Transformers keeps packed conversations apart by positions that restart, where no mask is given
                mask = (documents >= 0).long() if positions is None else None
                features = self.adapter.compute_features(ids, attention_mask=mask, position_ids=positions)
            embeds = self.adapter.embed(ids[:, 1:])
        dtype = next(model.parameters()).dtype
        read = features[:, :-1, : self._features_read].to(dtype)
        if model.training and self.args.feature_noise:
            # From the device's default generator, whose state is in every checkpoint.
            noise = torch.rand_like(read) * 2 - 1
            size = read.square().mean(dim=-1, keepdim=True).sqrt()
            read = read + self.args.feature_noise * size * noise
        with self.accelerator.autocast():  # as in a prepared drafter, for evaluation before training
            outputs = model(
                inputs_embeds=embeds.to(dtype),
                features=read,
                num_steps=num_steps,
                position_ids=None if positions is None else positions[:, :-1],
                # row r joins x_r and x_{r+1}, so there is no row where another conversation begins between them
                document_ids=documents[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -1),
                scorer=scorer,
            )
        outputs = convert_to_fp32(outputs)
        # row r predicts f_{r+1}, whose last-layer part comes last
        return outputs, features[:, 1:, -self.adapter.hidden_size :], self.trained_rows(inputs)

    @staticmethod
    def trained_rows(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows that count in step 1, `torch.BoolTensor` of shape `[B, S-1]`: row r predicts x_{r+2}."""
        labels = inputs["labels"]
        trained = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
        trained[:, :-1] = labels[:, 2:] != IGNORED_LABEL
        return trained

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite.note(inputs, loss)
        return loss

    def get_batch_samples(self, *args, **kwargs):
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if num_items is not None:
            alone = self.args.world_size > 1 and not self.args.average_tokens_across_devices
            self._tokens.read(int(self.accelerator.gather(num_items).sum() if alone else num_items))
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        num_steps = args.rollout_steps_at(self.state.global_step / max(self.state.max_steps, 1))
        outputs, targets, trained = self.rollout(model, inputs, num_steps)
        batch = LossBatch.of_rollout(outputs.hidden_states, outputs.valid, targets, trained)
        token_ids, logit_offsets = self._loss_tokens(inputs["labels"])
        result = self._compare(batch, comparisons(args), token_ids, logit_offsets)
        share = 1.0 if num_items_in_batch is None else trained.sum() / num_items_in_batch
        total, metrics = weighted_sum(batch, args, share)
        # an argmax among sampled tokens equals the target's far more often than one over all tokens
        among = "" if token_ids is None else "_sampled"
        rates = conditional_acceptance(result.match, batch.places, outputs.valid, trained)
        metrics |= {f"acceptance_{step}{among}": rate for step, rate in enumerate(rates, start=1)}
        if model.training:
            self._metrics.add(metrics)
        total = self._finish_loss(total, model, inputs, num_items_in_batch)
        return (total, outputs) if return_outputs else total

    def _compare(
        self,
        batch: LossBatch,
        wanted: dict[Comparison, bool],
        token_ids: torch.Tensor | None = None,
        logit_offsets: torch.Tensor | None = None,
    ) -> PassResult:
        """Runs the pass over the whole vocabulary or some tokens."""
        result = chunked_pass(
            batch.hidden,
            batch.goals,
            self.adapter.logits,
            wanted,
            self.args,
            valid=batch.valid,
            token_ids=token_ids,
            logit_offsets=logit_offsets,
            chunk_size=self._chunk_size,
        )
        batch.compared = result.means
        return result

    def _finish_loss(self, loss: torch.Tensor, model: nn.Module, inputs: dict, num_items: Any) -> torch.Tensor:
        """This process's part of a loss, scaled so that the mean gradient over processes is that of the whole batch."""
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes
        if model.training and self.is_deepspeed_enabled:  # whose backward updates the weights
            self._finite.check_loss(inputs, loss, self.args, self.state)
        return loss

    # Logging and evaluation ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._metrics and "loss" in logs:
            means = self._metrics.drain(self.accelerator)
            length = chain_length(means)
            logs = {**logs, **means} if length is None else {**logs, **means, "acceptance_length": length}
            last = max(self.state.global_step - 1, 0)  # the last completed step, not the next one
            logs["rollout_steps"] = self.args.rollout_steps_at(last / max(self.state.max_steps, 1))
            logs["response_tokens"] = self.tokens_seen
        super().log(logs, *args, **kwargs)

    def _start_evaluation(self) -> Any:
        return ChainTotals(self.args.eval_chain_depth)

    def _evaluate_batch(self, totals: Any, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        outputs, targets, trained = self.rollout(model, inputs, self.args.eval_chain_depth)
        batch = LossBatch.of_rollout(outputs.hidden_states, outputs.valid, targets, trained)
        result = self._compare(batch, {cross_entropy: False})
        matches = torch.zeros(len(outputs.valid), *trained.shape, dtype=torch.bool)
        matches[:, trained.cpu()] = result.match.cpu()
        totals.add(result.means[cross_entropy][0], int(batch.valid[0].sum()), matches, trained.cpu())


def check_pair(drafter: CoralDraftModel, adapter: TargetAdapter, tokenizer: Any = None) -> None:
    """Raises `ValueError` unless the drafter's sizes fit the target and its hash fits the tokenizer."""
    adapter.check_drafter(drafter.config)
    if tokenizer is not None:
        check_vocabulary(drafter.config, tokenizer)


__all__ = ["CoralTrainer", "check_pair"]
