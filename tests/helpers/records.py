"""Records as `coral-hf benchmark` writes them."""

import json

from coral_hf.drafter.weight_files import file_sha256


ENVIRONMENT = {
    "coral_hf": "0.1.0",
    "commit": "0123456789ab",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "python": "3.11",
    "device": "Abacus 3000",
    "dtype": "bfloat16",
    "threads": 2,
}


def make_record(digest: str | None, **changes) -> dict:
    """A record like that of `coral-hf benchmark`."""

    def row(method, benchmark, tau, speedup):
        return {
            "method": method,
            "benchmark": benchmark,
            "temperature": 0.0,
            "n_prompts": 10,
            "n_turns": 10,
            "tokens_per_second": 20.0,
            "speedup": speedup,
            "speedup_quartiles": [speedup - 0.1, speedup + 0.1],
            "acceptance_length": tau,
            "identical": 9,
            **({"acceptance_per_depth": [0.8, 0.65]} if tau and tau > 1 else {}),
        }

    record = {
        "environment": ENVIRONMENT,
        "target": "org/target",
        "drafter": "drafter",
        "drafter_sha256": digest,
        "max_new_tokens": 64,
        "prompts": {"gsm8k": [f"gsm8k-{index}" for index in range(10)]},
        "methods": {"coral": {}, "lookup": {"prompt_lookup_num_tokens": 3}},
        "draft_settings": {"coral": {"draft_depth": 2, "draft_top_k": 1, "draft_total_tokens": 3, "draft_head": None}},
        "partial": False,
        "runs": [
            row("plain", "gsm8k", 1.0, 1.0),
            row("coral", "gsm8k", 2.347, 1.618),
            row("lookup", "gsm8k", None, 1.1),
            row("plain", "all", 1.0, 1.0),
            row("coral", "all", 2.221, 1.5),
            row("lookup", "all", None, 1.05),
        ],
    }
    record |= changes
    return {key: value for key, value in record.items() if key != "drafter_sha256" or value is not None}


def add_record(folder, name="benchmark.json", digest="own", **changes):
    digest = file_sha256(folder / "model.safetensors") if digest == "own" else digest
    (folder / "training" / name).write_text(json.dumps(make_record(digest, **changes)))
