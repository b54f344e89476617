"""Estimates the cost of a training: measured on two real steps, or computed from configs alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from ...drafter.configuration_coral import CoralDraftConfig
from ...drafter.modeling_coral import CoralDraftModel
from ...utils.compat import enable_checkpointing
from ...utils.hardware import synchronized_clock
from ..recipe import choose_recipe, drafter_settings
from ..run.checkpoints import checkpoint_bytes


STEPS = 2
_GIB = 2**30


@dataclass
class TrainingEstimate:
    """Costs of a training. Every figure is an estimate unless `measured` names it.

    Args:
        drafter_parameters (`int`), trainable_parameters (`int`), target_parameters (`int`).
        memory (`dict[str, int]`): bytes per part on one device. `peak` is their sum, or measured.
        checkpoint_bytes (`int`): size of one checkpoint.
        feature_cache_bytes (`int`): size of the feature cache with `cache_features`.
        tokens (`int`): tokens that target and drafter read over the whole training.
        tokens_per_second (`float`, *optional*)
        measured (`tuple[str, ...]`): figures that were measured instead of computed.
    """

    drafter_parameters: int
    trainable_parameters: int
    target_parameters: int
    memory: dict[str, int]
    checkpoint_bytes: int
    feature_cache_bytes: int
    tokens: int
    tokens_per_second: float | None = None
    measured: tuple[str, ...] = field(default_factory=tuple)

    @property
    def hours(self) -> float | None:
        return None if not self.tokens_per_second else self.tokens / self.tokens_per_second / 3600

    def lines(self) -> list[str]:
        """The estimate as text; each line says whether it was measured."""

        def label(name: str) -> str:
            return "measured" if name in self.measured else "estimate"

        memory = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.memory.items() if name != "peak")
        lines = [
            f"parameters: drafter {self.drafter_parameters:,} ({self.trainable_parameters:,} trained), "
            f"target {self.target_parameters:,} (frozen)",
            f"peak memory ({label('memory')}): {self.memory['peak'] / _GIB:.2f} GiB per process"
            + (f" = {memory}" if memory else ""),
            f"disk (estimate): {self.checkpoint_bytes / _GIB:.2f} GiB per checkpoint; "
            f"{self.feature_cache_bytes / _GIB:.1f} GiB with --cache-features",
        ]
        if self.tokens_per_second:
            lines.append(f"speed ({label('speed')}): {self.tokens_per_second:,.0f} tokens/s")
            lines.append(f"time (estimate): {self.hours:.2f} hours for {self.tokens:,} tokens")
        return lines


def estimate_on_paper(
    target_config: Any,
    drafter_config: CoralDraftConfig | None = None,
    *,
    batch_size: int | None = None,
    length: int = 2048,
    num_steps: int | None = None,
    tokens: int = 0,
    epochs: float | None = None,
    tokens_per_second: float | None = None,
    flops_per_second: float | None = None,
    loss_chunk_size: int | None = None,
    activation_checkpointing: bool = False,
) -> TrainingEstimate:
    """Estimates a training from configs on the meta device, without weights.

    Assumes a target in bf16 and a drafter in fp32 with bf16 autocast and AdamW. Activations are the tensors that autograd
    keeps from a rollout in bf16.

    Args:
        target_config (`PreTrainedConfig`)
        drafter_config ([`CoralDraftConfig`], *optional*): defaults to the config of a new drafter (`recipe.drafter_settings`).
        batch_size (`int`, *optional*), length (`int`): sizes of one micro-batch on one device.
        num_steps (`int`, *optional*): the largest K.
        tokens (`int`): tokens of the data set; epochs (`float`, *optional*): passes over it.
        tokens_per_second (`float`, *optional*): speed of all devices; by default computed from flops_per_second.
        flops_per_second (`float`, *optional*): speed that the devices reach together in practice.
        loss_chunk_size (`int`, *optional*), activation_checkpointing (`bool`): see [`CoralTrainingArguments`].

        Missing values are those that a training on an accelerator would choose (`recipe.choose_recipe`).

    Returns:
        [`TrainingEstimate`]
    """
    text = target_config.get_text_config()
    if drafter_config is None:
        drafter_config = CoralDraftConfig.from_target(target_config, **drafter_settings(target_config))
    recipe = choose_recipe(text.hidden_size, text.vocab_size, response_tokens=tokens, device_type="cuda")
    batch_size = recipe.per_device_train_batch_size if batch_size is None else batch_size
    num_steps = recipe.deepest if num_steps is None else num_steps
    epochs = recipe.num_train_epochs if epochs is None else epochs
    with torch.device("meta"):
        drafter = CoralDraftModel(drafter_config)
        target = AutoModelForCausalLM.from_config(target_config, dtype=torch.bfloat16)
    drafter_size, target_size = count(drafter), count(target)
    rows, hidden, vocabulary = batch_size * length, text.hidden_size, text.vocab_size
    layers = drafter_config.target_feature_layers
    chunk = loss_chunk_size or recipe.loss_chunk_size
    read = hidden * (len(layers) if layers[-1] == -1 else len(layers) + 1)
    memory = {
        "target weights": 2 * target_size,
        "drafter weights": 4 * drafter_size,
        "gradients": 4 * drafter_size,
        "optimizer": 8 * drafter_size,
        # bf16 copies of the weights under autocast
        "autocast": 2 * drafter_size,
        "activations": rollout_bytes(drafter, batch_size, length, num_steps, activation_checkpointing),
        # features, drafter outputs and their gradients; regression makes fp32 copies
        "features": rows * (2 * read + num_steps * hidden * (2 + 2 + 4)),
        # both distributions, the current logits and, for a bf16 head, their gradient in its dtype
        "loss": 4 * 4 * min(chunk, rows) * vocabulary,
        # the widest layer of a target forward
        "target forward": 2 * rows * (4 * hidden + 3 * getattr(text, "intermediate_size", 4 * hidden)),
    }
    memory["peak"] = sum(memory.values())
    if tokens_per_second is None and flops_per_second is not None:
        body = target_size - vocabulary * hidden * (1 if text.tie_word_embeddings else 2)
        # forward 2 and backward 4 per weight; the head runs once for the target, and twice (with its gradient) per step
        per_token = 2 * body + 6 * num_steps * drafter_size + 2 * vocabulary * hidden * (1 + 2 * num_steps)
        tokens_per_second = flops_per_second / per_token
    return TrainingEstimate(
        drafter_parameters=drafter_size,
        trainable_parameters=drafter_size,
        target_parameters=target_size,
        memory=memory,
        checkpoint_bytes=3 * 4 * drafter_size,
        feature_cache_bytes=2 * tokens * read,
        tokens=int(tokens * epochs),
        tokens_per_second=tokens_per_second,
    )


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def rollout_bytes(drafter: CoralDraftModel, batch_size: int, length: int, num_steps: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps from a rollout in bf16, without parameters, for a drafter on the meta device."""
    if num_steps < 1:
        return 0
    config = drafter.config
    with torch.device("meta"):
        copy = CoralDraftModel(config).to(torch.bfloat16).train()
        embeds = torch.empty(batch_size, length, config.hidden_size, dtype=torch.bfloat16)
        size = config.num_target_features * config.hidden_size
        features = torch.empty(batch_size, length, size, dtype=torch.bfloat16)
        documents = torch.empty(batch_size, length, dtype=torch.long)
    if checkpointing:
        enable_checkpointing(copy)
    parameters = {parameter.untyped_storage()._cdata for parameter in copy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # fused attention keeps no weights, but on the meta device step 1 runs plain attention
        scores = batch_size * config.num_attention_heads * length**2
        weights = tensor.shape[-2:] == (length, length) and tensor.numel() == scores
        if storage._cdata not in parameters and not (weights and tensor.is_floating_point()):
            kept[storage._cdata] = tensor  # referenced, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = copy(embeds, features, num_steps=num_steps, document_ids=documents)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if checkpointing:
        # the outputs stay for the losses, and the deepest step is recomputed in the backward pass
        total += sum(hidden.nbytes for hidden in outputs.hidden_states)
        whole = [rollout_bytes(drafter, batch_size, length, steps, False) for steps in (num_steps, num_steps - 1)]
        total += whole[0] - whole[1]
    return total


# Measured ------------------------------------------------------------------------------------------------------


def without_traces(args: Any, folder: str) -> None:
    """Sets arguments so that two steps at the largest K run, and nothing is written, reported or pushed."""
    args.output_dir, args.max_steps = folder, STEPS
    args.save_strategy = args.eval_strategy = "no"
    args.report_to, args.push_to_hub, args.cache_features, args.learning_curve = [], False, None, False
    args.load_best_model_at_end = args.eval_on_start = False
    args.disable_tqdm, args.logging_steps = True, STEPS + 1
    args.rollout_schedule = str(max(steps for steps, _ in args.rollout))
    args.rollout = [(int(args.rollout_schedule), 1.0)]


def measure_training(trainer: Any, epochs: float) -> TrainingEstimate:
    """Runs two real steps of a trainer whose arguments went through [`without_traces`].

    Args:
        trainer ([`CoralTrainer`])
        epochs (`float`): passes over the data in the training to estimate.

    Returns:
        [`TrainingEstimate`]: memory and speed are measured on the longest rows at the largest K, so both are conservative.
        Tokens are response tokens.
    """
    clock = _Clock()
    trainer.add_callback(clock)
    device, dataset = trainer.args.device, trainer.train_dataset
    lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    longest = sorted(range(len(dataset)), key=lengths.__getitem__, reverse=True)
    # in this order, which random sampling or sampling by length would change
    trainer.train_dataset = torch.utils.data.Subset(dataset, longest[: STEPS * trainer._global_batch()])
    trainer.args.train_sampling_strategy = "sequential"
    reset_peak(device)
    trainer.train()
    trainer.train_dataset = dataset
    model = trainer.accelerator.unwrap_model(trainer.model)
    read = trainer.adapter.hidden_size * len(trainer.adapter.feature_layers)
    return TrainingEstimate(
        drafter_parameters=count(model),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        target_parameters=count(trainer.target_model),
        memory={"peak": peak_memory(device)},
        checkpoint_bytes=checkpoint_bytes(model, trainer.args.save_only_model),
        feature_cache_bytes=2 * sum(lengths) * read,
        tokens=int(dataset.num_response_tokens * epochs),
        tokens_per_second=trainer.tokens_seen / clock.seconds,
        measured=("memory", "speed"),
    )


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
        self._start = synchronized_clock([args.device])

    def on_step_end(self, args: Any, *_: Any, **kwargs: Any) -> None:
        self.seconds += synchronized_clock([args.device]) - self._start


def reset_peak(device: torch.device) -> None:
    """Resets the measurement of peak memory, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak is then that since the start of the process, including model loading
        return


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device's allocator on a GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


__all__ = ["TrainingEstimate", "estimate_on_paper", "measure_training", "without_traces"]
