"""Predicts speedups of the paper's 7B targets on a GPU from bytes and bandwidth. Nothing here is measured.

    python benchmarks/predict_from_bandwidth.py --json benchmarks/records/predictions_7b.json
    python benchmarks/predict_from_bandwidth.py --bandwidth_gb_s 2039 --gpu "A100 80GB" --acceptance 0.75 0.7 0.7 0.65

For one token at a time, a GPU waits for memory: a forward pass takes as long as reading the weights. The same is true for up to
about 64 tokens, whose arithmetic fits into that time. Launches, attention over the context and everything around the forward
passes are left out. The figures are therefore upper bounds.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.evaluation.methods import PRESETS
from coral_hf.evaluation.prediction import expected_acceptance_length, predict_speedup


GPUS = {"A6000": 768.0, "H100 SXM": 3350.0}  # GB/s, from NVIDIA's data sheets
# hidden, intermediate, layers, width of k and v, vocabulary: the published config.json of each
TARGETS = {
    "Llama-2-7B-chat": (4096, 11008, 32, 4096, 32_000),
    "Llama-3-8B-Instruct": (4096, 14336, 32, 1024, 128_256),
    "Qwen2.5-7B-Instruct": (3584, 18944, 28, 512, 152_064),
}
BYTES = 2  # bfloat16
ROUTED_LENGTH = 4.63 / 4.90  # acceptance length with and without the router, as CORAL reports for Qwen2.5-7B


@dataclass
class Arguments:
    gpu: str = field(default="", metadata={"help": f"One of {list(GPUS)} alone, or another with --bandwidth_gb_s."})
    bandwidth_gb_s: float | None = field(default=None, metadata={"help": "Memory bandwidth of the GPU."})
    achievable: float = field(default=0.8, metadata={"help": "Assumed achievable share of the bandwidth."})
    acceptance: list[float] = field(
        default_factory=lambda: [0.8] * 6, metadata={"help": "Assumed conditional acceptance by depth, full head."}
    )
    router_active: float = field(
        default=1 / 16, metadata={"help": "Assumed share of the head that a router computes."}
    )
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def layer_weights(hidden: int, intermediate: int, key_value: int) -> int:
    """A decoder layer: q, k, v and o, and the gated MLP."""
    return 2 * hidden**2 + 2 * hidden * key_value + 3 * hidden * intermediate


def predict(gpu: str, bandwidth: float, target: str, arguments: Arguments) -> list[dict]:
    """The rows of one target on one GPU: with the full head and with a router."""
    hidden, intermediate, layers, key_value, vocabulary = TARGETS[target]
    layer, head = layer_weights(hidden, intermediate, key_value), vocabulary * hidden
    per_ms = bandwidth * 1e6 * arguments.achievable / BYTES  # weights read in a millisecond
    target_ms = (layers * layer + head) / per_ms  # of the embedding single rows are read
    drafter_ms = (layer + 2 * hidden**2) / per_ms  # the eagle shape: its layer and fc
    mlp = hidden * (hidden // 2)  # the router's, of half the width
    heads = {"full": head / per_ms, "router": (arguments.router_active * head + mlp) / per_ms}
    rows = []
    for name, head_ms in heads.items():
        length = expected_acceptance_length(arguments.acceptance)
        if name == "router":
            length = max(1.0, length * ROUTED_LENGTH)
        draft_ms = len(arguments.acceptance) * (drafter_ms + head_ms)
        times = {
            "target_ms": target_ms,
            "drafter_layer_ms": drafter_ms,
            "draft_head_ms": head_ms,
            "draft_ms": draft_ms,
        }
        speedup = predict_speedup(target_ms, target_ms + draft_ms, length)
        rows.append(
            {"figures": "predicted, not measured", "gpu": gpu, "target": target, "head": name}
            | {f"predicted_{key}": round(value, 3) for key, value in times.items()}
            | {"assumed_acceptance_length": round(length, 2), "predicted_speedup": round(speedup, 2)}
        )
    return rows


def main() -> None:
    (arguments,) = parse_script(Arguments)
    check_output_file(arguments.json)
    given = arguments.bandwidth_gb_s
    if not 0 < arguments.achievable <= 1 or not 0 < arguments.router_active <= 1 or (given is not None and given <= 0):
        raise ValueError("--achievable and --router_active are shares above 0, --bandwidth_gb_s is positive.")
    gpus = {arguments.gpu or "GPU": given}
    if given is None:
        if arguments.gpu not in ("", *GPUS):
            raise ValueError(f"--gpu {arguments.gpu} is none of {', '.join(GPUS)}: give its --bandwidth_gb_s too.")
        gpus = {arguments.gpu: GPUS[arguments.gpu]} if arguments.gpu else GPUS
    rows = [row for gpu in gpus for target in TARGETS for row in predict(gpu, gpus[gpu], target, arguments)]
    for row in rows:
        print(
            f"predicted, not measured: {row['target']}, {row['gpu']}, {row['head']} head: plain step "
            f"{row['predicted_target_ms']:.1f} ms, drafting {row['predicted_draft_ms']:.1f} ms, assumed tau "
            f"{row['assumed_acceptance_length']:.2f}: {row['predicted_speedup']:.2f}x"
        )
    if arguments.json is None:
        return
    assumptions = {
        "times": "bytes of bf16 weights / (bandwidth x achievable share); T(n) = T(1) up to 64 tokens; launches, attention "
        "over the context, tree and sampling left out: upper bounds",
        "bandwidth_gb_s": {"values": gpus, "source": "NVIDIA's data sheets" if given is None else "entered by hand"},
        "achievable": {"value": arguments.achievable, "source": "assumed"},
        "sizes": {"source": "published config.json of each target; the drafter is of the eagle shape"},
        "tree": {**PRESETS["eagle2"], "source": "EAGLE-2's own; a drafter forward for every level of --acceptance"},
        "acceptance_per_depth": {"values": arguments.acceptance, "source": "assumed, alike for all targets"},
        "router": {
            "active": arguments.router_active,
            "source": "assumed; tau falls as CORAL reports for Qwen2.5-7B (4.90 to 4.63)",
        },
    }
    record = {"figures": "predicted, not measured", "assumptions": assumptions, "rows": rows}
    Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
