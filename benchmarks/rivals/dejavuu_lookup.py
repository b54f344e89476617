"""Lookup methods of the `dejavuu` package (PyPI, read at 0.2.0), behind `compare_rivals.py`.

Its metadata asks for Python 3.13; its code also runs on 3.11 (`pip install --ignore-requires-python --no-deps dejavuu==0.2.0 loguru
onnxruntime`). Its cache is cropped as Transformers did it before 5.24, by a length; here it is told how many tokens to remove.
"""

import importlib.metadata
from typing import Any, ClassVar

import torch


_BUDGET = 8  # nodes drafted per step: the package's default


class Rival:
    """A target that drafts from its text and its own earlier logits.

    Args:
        target (`PreTrainedModel`), drafter, depth: the last two are other methods'.
        method (`str`): a drafter of the package.

    Raises:
        ImportError: if dejavuu is not installed.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        method: {"method": method} for method in ("token_recycling", "pld", "suffix_decoding", "suffix_recycle")
    }

    def __init__(self, target: Any, drafter: Any, depth: int, method: str = "token_recycling"):
        try:
            from dejavuu.core.engine import generate
            from dejavuu.decoders.hf import HFBackend
            from dejavuu.drafters import make_drafter
        except ImportError as error:
            raise ImportError(
                "--rival dejavuu needs the package: pip install --ignore-requires-python --no-deps dejavuu==0.2.0 loguru "
                f"onnxruntime ({error})"
            ) from error

        class Backend(HFBackend):
            """Its backend around a model that is loaded already."""

            def __post_init__(self) -> None:
                self._torch, self._model = torch, target

            def rollback_kv(self, kv: Any, committed: int) -> Any:
                kv.crop(committed - kv.get_seq_length())
                return kv

        self.version = f"dejavuu {importlib.metadata.version('dejavuu')}"
        self._backend = Backend("target", device=str(target.device), emit_hidden=False)
        self._generate, self._drafter = generate, make_drafter(method)

    def answer(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], int]:
        """The greedy answer to ids `[1, L]`, and its verify steps. The package reads the last token of a prompt in the first of them."""
        found = self._generate(self._backend, ids[0].tolist(), max_new_tokens, self._drafter, _BUDGET)
        return found.tokens, max(found.steps - 1, 1)
