"""Places the frozen target: whole on every process, or with its layers sharded over the processes."""

from typing import Any

from torch import nn

from ...drafter.target_adapter import TargetAdapter
from ...utils.hardware import check_one_device


def check_devices(args: Any) -> None:
    """Raises `ValueError` if `Trainer` would run the drafter on several GPUs of one process (`DataParallel`), because
    the target is on one of them."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which trains on only one: start a process for each with `accelerate "
            "launch` (--multi_gpu), or make one visible (CUDA_VISIBLE_DEVICES=0)."
        )


def place_target(adapter: TargetAdapter, accelerator: Any, shard: bool = False) -> None:
    """Moves the target to this process's device once. It is never wrapped, trained or saved with the drafter.

    Args:
        adapter ([`TargetAdapter`])
        accelerator (`Accelerator`)
        shard (`bool`): split the decoder layers over the processes (FSDP2's `fully_shard`, gathered layer by layer in
            each forward pass). Embedding, norms and head stay whole, because losses read them at any time.

    Raises:
        ValueError: if there is only one process to shard over, or a `device_map` placed the target on several devices.
    """
    target = adapter.target
    check_one_device(target)
    placed = getattr(target, "hf_device_map", None) is not None
    if not shard:
        if not placed:
            target.to(accelerator.device)
        return
    if accelerator.num_processes < 2 or placed:
        why = "its device_map placed it already" if placed else "there is one process only"
        raise ValueError(
            f"shard_target=True, but {why}: start several with `accelerate launch`, without a device_map."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = decoder_layers(adapter)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for layer in layers:
        layer.to(accelerator.device)
        fully_shard(layer, mesh=mesh)
    for module in target.modules():
        if id(module) not in inside:
            _move_own(module, accelerator.device)


def plain_sharding(accelerator: Any) -> None:
    """Makes FSDP treat the drafter as one unit, because its rollout calls parts of its only layer, which separate units
    would leave sharded.

    Raises:
        ValueError: under DeepSpeed ZeRO stage 3, which would split frozen embedding and head as well.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.auto_wrap_policy = None
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO stage 3 splits every parameter, the target's embedding and head too, which the losses read "
            "at any time. Use stage 1 or 2 (a drafter is small), or FSDP with --shard_target true for a large target."
        )


def _move_own(module: nn.Module, device: Any) -> None:
    """Moves a module's own tensors, not its children's, because sharded children cannot be moved."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def decoder_layers(adapter: TargetAdapter) -> nn.ModuleList:
    """The target's decoder layers, identified by their number."""
    count = adapter.text_config.num_hidden_layers
    for module in adapter.target.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(adapter.target).__name__} has no list of {count} decoder layers to shard; use shard_target=False."
    )


def check_packing(adapter: TargetAdapter) -> None:
    """Raises `ValueError` if the target would mix packed conversations."""
    config = adapter.text_config
    mixing = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if mixing:
        raise ValueError(
            f"packing=True: the target's layers of type {', '.join(mixing)} run across the conversations of a row; train "
            "without packing."
        )
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"packing=True: the target runs with attn_implementation={implementation!r}, which does not keep the "
            'conversations of several rows apart; load it with attn_implementation="sdpa".'
        )


def end_processes(trainer: Any) -> None:
    """Ends the communication between processes, including its threads, before the interpreter shuts down.

    The gradient synchronisation of a wrapped model keeps the threads alive after `destroy_process_group`. A gloo thread that
    releases its last tensor during shutdown aborts the process (PyTorch issue 190489).
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


__all__ = [
    "check_devices",
    "check_packing",
    "decoder_layers",
    "end_processes",
    "place_target",
    "plain_sharding",
]
