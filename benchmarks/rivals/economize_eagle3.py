"""EAGLE-3 chains of the `economize` package (PyPI, version 0.3.2) with a CORAL drafter, for `compare_rivals.py`.

economize reads published EAGLE-3 folders. The fed-back feature is the state before the norm, nothing is normed before `fc`, and
the folder contains the LM head.
"""

import importlib.metadata
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from coral_hf.conversion import export_drafter


class Rival:
    """A target with economize's EAGLE-3 attached.

    Args:
        target (`PreTrainedModel`)
        drafter ([`CoralDraftModel`]): of the `eagle3` shape, with `norm_output=False`.
        depth (`int`): tokens drafted per step.

    Raises:
        ImportError: if economize is not installed.
        ValueError: if it cannot express the drafter.
    """

    def __init__(self, target: Any, drafter: Any, depth: int):
        try:
            import economize
        except ImportError as error:
            raise ImportError("--rival economize needs the package: pip install economize==0.3.2") from error
        config = drafter.config
        names = ("norm_output", "norm_before_fc", "fc_norm") if config.shape == "eagle3" else ()
        refused = [name for name in names if getattr(config, name)]
        if config.shape != "eagle3" or refused:
            found = ", ".join(f"{name}=True" for name in refused) or f"shape={config.shape!r}"
            raise ValueError(f"economize cannot express this drafter: {found}. It only reads EAGLE-3's original form.")
        self.version = f"economize {importlib.metadata.version('economize')}"
        self.decoding = economize.DecodeConfig(cycle_length=depth)
        with TemporaryDirectory() as scratch:
            self.model = economize.load(target, str(write_with_head(drafter, target, Path(scratch) / "drafter")))

    def answer(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], int]:
        """The greedy answer to ids `[1, L]`, and its verification steps: the target's forward passes after the prefill."""
        result = self.model.decode(ids[0], max_new_tokens, decoding=self.decoding)
        return result.tokens[-max_new_tokens:].tolist(), result.cost_summary()["exact_calls"] - 1


def write_with_head(drafter: Any, target: Any, folder: Path) -> Path:
    """Writes the folder that vLLM reads, with the target's LM head if the drafter has none."""
    export_drafter(drafter, "vllm", folder, target, "target")
    if drafter.draft_head is None:
        weights, path = load_file(folder / "model.safetensors"), folder / "config.json"
        weights["lm_head.weight"] = target.get_output_embeddings().weight.detach().cpu().to(drafter.dtype).clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "draft_vocab_size": config["vocab_size"]}))
    return folder
