"""The EAGLE-3 step of SpecForge (PyPI, read at 0.2.0), for `measure_step.py`.

What its offline strategy does with a batch: the frozen target head over the stored states, `OnlineEagle3Model`, losses weighted by
0.8 ** k, backward, `BF16Optimizer`. Its loss is a Triton kernel; `load` replaces it by the reference of the same file.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig


CHANGED = [
    "the loss is its file's reference, _compute_loss (the Triton kernel needs a GPU)",
    "the target's head in float32 (TargetHead.from_pretrained makes it bfloat16)",
    "the draft's LM head is frozen, as in the other trainers (by default it is trained)",
]
_DECAY = 0.8  # of its strategy


def _step(folder: Path, settings: dict[str, Any], reference_loss: bool) -> tuple[Callable[[], float], Any]:
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.modeling.target.target_head import TargetHead
    from specforge.optimizer import BF16Optimizer

    if reference_loss:
        from specforge.core.loss import _compute_loss

        eagle3.LogSoftmaxLoss = SimpleNamespace(apply=_compute_loss)
    path = str(folder / "target")
    known = AutoConfig.from_pretrained(path)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    names = (*names, "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
    config = LlamaConfig(**{name: getattr(known, name) for name in names}, num_hidden_layers=1, pad_token_id=0)
    config.draft_vocab_size = known.vocab_size
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa").float()
    draft.load_embedding(path, settings["embedding_key"])
    draft.freeze_embedding()
    if reference_loss:
        draft.lm_head.weight.requires_grad_(False)
    model = eagle3.OnlineEagle3Model(draft, length=settings["steps"], attention_backend="sdpa").train()
    head = TargetHead.from_pretrained(path, lm_head_key=settings["head_key"])
    if reference_loss:
        with torch.no_grad():
            head = head.float()
            head.load_weights(path, settings["head_key"])  # what bfloat16 rounded
    optimizer = BF16Optimizer(model, lr=settings["learning_rate"])
    data = load_file(folder / "batch.safetensors")
    mask = torch.ones_like(data["input_ids"])

    def step() -> float:
        ids, target, loss_mask = head.preprocess(data["input_ids"], data["last"], data["loss_mask"])
        losses = model(
            input_ids=ids,
            attention_mask=mask,
            loss_mask=loss_mask,
            target=head(target.to(head.fc.weight.dtype)),
            hidden_states=data["features"],
        )[0]
        loss = sum(_DECAY**index * value for index, value in enumerate(losses))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, draft


def published(folder: Path, settings: dict[str, Any]) -> None:
    """A step of its own code, as published."""
    _step(folder, settings, reference_loss=False)[0]()


def load(folder: Path, settings: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """A step on the batch in `folder`, and what the record says of it."""
    step, draft = _step(folder, settings, reference_loss=True)
    version = f"specforge {importlib.metadata.version('specforge')}"
    trained = sum(weight.numel() for weight in draft.parameters() if weight.requires_grad)
    return step, {"version": version, "trained_parameters": trained, "changed": CHANGED}
