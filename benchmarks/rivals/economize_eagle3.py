"""EAGLE-3 chains of the `economize` package (PyPI, version 0.3.2) with a CORAL drafter, for `compare_rivals.py`.

economize reads published EAGLE-3 folders: nothing is normed before `fc`, and the folder contains the LM head. A shortlist selects
rows of that head.

economize refuses `norm_output=True`, because its fed-back feature is the state before the norm. For such a drafter this file
gives the loaded model a subclass of economize's drafter that feeds back the normed state. The installed package stays as it is.
The record names the change as `adapted`.
"""

import importlib.metadata
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from coral_hf.conversion import export_drafter
from coral_hf.drafter.configuration_coral import FC_NORMS


class Rival:
    """A target with economize's EAGLE-3 attached. `adapted` lists the changes made in memory to run the drafter.

    Args:
        target (`PreTrainedModel`)
        drafter ([`CoralDraftModel`]): of the `eagle3` shape, not normed before `fc`.
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
        refused = [name for name in FC_NORMS if getattr(config, name)] if config.shape == "eagle3" else []
        if config.shape != "eagle3" or refused:
            found = ", ".join(f"{name}=True" for name in refused) or f"shape={config.shape!r}"
            raise ValueError(f"economize cannot express this drafter: {found}. It only reads EAGLE-3's original form.")
        self.version = f"economize {importlib.metadata.version('economize')}"
        # a cycle also contains the exact token that a verification step adds
        self.decoding = economize.DecodeConfig(cycle_length=depth + 1)
        with TemporaryDirectory() as scratch:
            self.model = economize.load(target, str(write_folder(drafter, target, Path(scratch) / "drafter")))
        self.adapted = ["norm_output"] if config.norm_output else []
        if config.norm_output:
            feed_back_normed(self.model.techniques["eagle3"])

    def answer(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], int]:
        """The greedy answer to ids `[1, L]`, and its verification steps: the target's forward passes after the prefill."""
        result = self.model.decode(ids[0], max_new_tokens, decoding=self.decoding)
        return result.tokens[-max_new_tokens:].tolist(), result.cost_summary()["exact_calls"] - 1


def feed_back_normed(technique: Any) -> None:
    """Makes a technique's drafter feed back the normed output of a draft step. Other models are not changed."""
    from economize.techniques.eagle3 import Eagle3Drafter

    class NormedDrafter(Eagle3Drafter):
        def step(self, tokens: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
            before = self._state
            logits = super().step(tokens, positions, valid)
            normed = self.technique.norm(self._state)
            # rows that have stopped keep their state
            self._state = normed if valid is None else torch.where(valid.to(normed.device)[:, None], normed, before)
            return logits

    technique.drafter = lambda runner: NormedDrafter(technique)


def write_folder(drafter: Any, target: Any, folder: Path) -> Path:
    """Writes the folder that economize reads: vLLM's, without `norm_output`. A drafter without an LM head gets the target's,
    or the shortlisted rows of it."""
    export_drafter(drafter, "vllm", folder, target, "target")
    weights, path = load_file(folder / "model.safetensors"), folder / "config.json"
    config = {**json.loads(path.read_text()), "norm_output": False}
    if drafter.draft_head is None:
        head = target.get_output_embeddings().weight.detach().cpu().to(drafter.dtype)
        if drafter.shortlist is not None:
            ids = drafter.shortlist.token_ids.cpu()
            head, weights["d2t"] = head[ids], ids - torch.arange(len(ids))
        weights["lm_head.weight"] = head.clone()
        config["draft_vocab_size"] = len(head)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config))
    return folder
