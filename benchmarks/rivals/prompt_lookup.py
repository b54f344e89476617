"""Transformers' prompt lookup, over its lengths, behind `compare_rivals.py`: what needs no drafter at all."""

from typing import Any, ClassVar

import torch
import transformers
from rivals.forwards import counted_forwards

from coral_hf.evaluation.methods import measure


class Rival:
    """A target that copies from its text.

    Args:
        target (`PreTrainedModel`), drafter, depth: the last two are other methods'.
        tokens (`int`): that are copied at most.
        ngram (`int`): longest match.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        f"{tokens} after {ngram}-grams": {"tokens": tokens, "ngram": ngram}
        for ngram in (2, 3)
        for tokens in (3, 5, 10, 20)
    }

    def __init__(self, target: Any, drafter: Any, depth: int, tokens: int = 10, ngram: int = 2):
        self.target, self.version = target, f"transformers {transformers.__version__}"
        self.settings = {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": ngram}

    def answer(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], int]:
        """The greedy answer to ids `[1, L]`, and its verify steps."""
        with counted_forwards(self.target) as forwards:
            found = measure(self.target, ids, max_new_tokens, **self.settings)
        return found.new_ids, len(forwards) - 1
