"""Prompt lookup of the `flashspec` package (PyPI, read at 0.3.1), behind `compare_rivals.py`.

Its drafter that needs no second model, in its eager loop (its compiled path needs CUDA). Its README lists the CPU under "Not yet".
"""

import importlib.metadata
from typing import Any, ClassVar

import torch
from rivals.forwards import counted_forwards


class Rival:
    """A target that copies from its text, by flashspec's engine.

    Args:
        target (`PreTrainedModel`), drafter, depth: the last two are other methods'.
        tokens (`int`): that are copied per step.

    Raises:
        ImportError: if flashspec is not installed.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {f"{tokens} tokens": {"tokens": tokens} for tokens in (2, 4, 6)}

    def __init__(self, target: Any, drafter: Any, depth: int, tokens: int = 6):
        try:
            from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
            from flashspec.engine import NgramDrafter, TargetModel
        except ImportError as error:
            raise ImportError(
                f"--rival flashspec needs the package: pip install --no-deps flashspec==0.3.1 pydantic ({error})"
            ) from error
        self.target, self.version = target, f"flashspec {importlib.metadata.version('flashspec')}"
        config = FlashSpecConfig(
            device=str(target.device),
            drafter_strategy="bandit",  # its name for one arm for each drafter, of which there is one
            bandit=BanditConfig(n_arms=1),
            sampling=SamplingConfig(temperature=0.0, gamma=tokens),
        )
        model = TargetModel("target", target.device, target.dtype, model=target)
        self.engine = SpeculativeEngine(config, [NgramDrafter()], model)

    def answer(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], int]:
        """The greedy answer to ids `[1, L]`, and its verify steps."""
        with counted_forwards(self.target) as forwards:
            found = self.engine.generate(ids, max_new_tokens=max_new_tokens)
        # it reads a prompt without its last token first
        return found.output_ids[0].tolist(), max(len(forwards) - 2, 1)
