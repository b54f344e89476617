"""One tiny training as a program of its own, to be killed, resumed or launched in several processes.

python training_process.py '{"output": DIR, "settings": {...}}'   (see `main`)
"""

import glob
import json
import os
import sys
import time
from pathlib import Path

import torch
from helpers.tiny_models import make_target


def allow_fsdp_on_cpu() -> None:
    """Accelerate uses FSDP on accelerators only. Its code also runs on CPU ranks that look like accelerators."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


def adapters(rank: int):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian")


def main() -> None:
    options = json.loads(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    from helpers.tiny_trainings import make_args, quick_drafter, random_rows, weights

    from coral_hf.training.low_rank_trainer import CoralLowRankTrainer
    from coral_hf.training.run import checkpoints
    from coral_hf.training.trainer import CoralTrainer

    output = Path(options["output"])
    if options.get("slow_save"):  # time to be killed between two files of a checkpoint
        save = CoralTrainer._save_optimizer_and_scheduler

        def slow(self, folder):
            save(self, folder)
            Path(options["slow_save"]).touch()
            time.sleep(60)

        CoralTrainer._save_optimizer_and_scheduler = slow
    if options.get("file_limit"):  # a write that fails half-way, as on a full disk
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_limit"], resource.RLIM_INFINITY))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    target = make_target(dtype=getattr(torch, options.get("dtype", "float32")))
    drafter = quick_drafter(target, seed=options.get("seed", 1))
    if options.get("router_groups"):
        drafter.add_router(options["router_groups"])
    if options.get("low_rank_size"):
        drafter.add_low_rank_head(target, options["low_rank_size"])
    trainer_class = CoralLowRankTrainer if options["settings"].get("stage") == "low_rank" else CoralTrainer
    trainer = trainer_class(
        model=drafter,
        target_model=target,
        args=make_args(output, **options["settings"]),
        train_dataset=random_rows(options.get("rows", 16)),
        eval_dataset=random_rows(5, seed=3) if options.get("evaluate") else None,
        peft_config=adapters(options["lora_rank"]) if options.get("lora_rank") else None,
    )
    if options.get("step_file"):
        step = trainer.training_step

        def counted(*args, **kwargs):
            loss = step(*args, **kwargs)
            Path(options["step_file"]).write_text(str(trainer.state.global_step))
            return loss

        trainer.training_step = counted
    try:
        trainer.train(resume_from_checkpoint=options.get("resume"))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    metrics = trainer.evaluate() if options.get("evaluate") else {}
    trainer.save_model(_internal_call=options.get("internal_save", False))  # as `push_to_hub` does
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        (output / "result.json").write_text(json.dumps({"history": history, "metrics": metrics}))
    if options.get("weights") and os.environ.get("RANK", "0") == "0":
        torch.save(weights(trainer.model), options["weights"])
    trainer.end_training()
    assert checkpoints.PARTIAL_FOLDER not in {path.name for path in output.iterdir()}
    threads = {Path(name).read_text().strip() for name in glob.glob("/proc/self/task/*/comm")}  # none but on Linux
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        assert not any("gloo" in name for name in threads), threads
    else:
        # FSDP keeps gloo's threads alive after the groups are destroyed, and one that lets go of its last tensor while
        # the interpreter shuts down aborts the process (PyTorch's issue 190489): leave without that shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
