"""Left-padded batches for targets that the key-value store does not support. A new batch begins when all rows have ended."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from ...utils.compat import cache_kwarg, cache_of
from ...utils.hardware import check_one_device
from .paths import layer_kinds, target_obstacle
from .recurrent_layers import LINEAR_TYPES
from .slot_cache import SlotCache


logger = logging.get_logger(__name__)


class PaddedBatch:
    """
    The interface of [`SlotCache`] for decoding without drafts, on Transformers' dynamic cache. Rows leave when they end, but new
    rows begin only after the last one has ended.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM, with recurrent layers or not.
        slots (`int`):
            Rows of a batch.
    """

    refill_at = 0  # new rows may begin at this number of live rows

    def __init__(self, target: PreTrainedModel, slots: int):
        check_one_device(target)
        self.target, self.slots, self.device = target, slots, target.device
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0)  # [rows of the cache, L]
        self._rows: list[int] = []  # each slot's row of the cache
        self._logits: torch.Tensor | None = None  # of the prefill, [rows, V]; None after the first step
        self._tokens = torch.zeros(0)  # each slot's last token, [n]

    def share_prefix(self, ids: list[int]) -> None:
        """Does nothing: each prompt is read whole."""

    def prefill(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """
        Reads prompts, each whole.

        Args:
            slots (`Sequence[int]`):
                The first slots, in order.
            prompts (`Sequence[list[int]]`):
                Their ids, of any lengths.
        """
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._rows = list(slots)
        self._mask = torch.tensor(mask, device=self.device)
        self._cache = DynamicCache(config=self.target.config)
        self._logits = self._run(torch.tensor(ids, device=self.device))

    def step(self, n: int) -> torch.Tensor:
        """
        Runs the last token of the first `n` slots through the target.

        Args:
            n (`int`):
                Live slots.

        Returns:
            `torch.Tensor` of shape `(n, V)`: the logits of the next token.
        """
        if self._logits is not None:
            logits, self._logits = self._logits, None
            return logits
        if self._rows[:n] != list(range(len(self._mask))):
            order = torch.tensor(self._rows[:n], device=self.device)
            self._cache.reorder_cache(order)  # type: ignore[union-attr]
            self._mask = self._mask[order]
            self._rows = list(range(n))
        self._mask = torch.cat([self._mask, self._mask.new_ones(n, 1)], dim=1)
        return self._run(self._tokens[:n, None])

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = self.target(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache_kwarg(self._cache),
        )
        self._cache = cache_of(outputs)
        return outputs.logits[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """Appends the tokens of shape `(n,)` that were chosen from the logits of the last `step`."""
        self._tokens = tokens.to(self.device)

    def move(self, source: int, destination: int) -> None:
        """Moves slot `source` into slot `destination`."""
        self._rows[destination] = self._rows[source]
        self._tokens = self._tokens.clone()
        self._tokens[destination] = self._tokens[source]


def decoding_slots(target: PreTrainedModel, slots: int) -> SlotCache | PaddedBatch:
    """
    Decodes several texts together: in slots that are filled one by one, or in padded batches for recurrent targets.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM.
        slots (`int`):
            Texts decoded at the same time.

    Raises:
        ValueError: as [`SlotCache`].
    """
    problem = target_obstacle(target)
    if problem is None or target.config.is_encoder_decoder or not LINEAR_TYPES & set(layer_kinds(target)):
        return SlotCache(target, slots)
    logger.warning_once(
        f"{type(target).__name__} does not support continuous batching: {problem}. Its texts are decoded in padded batches of up "
        f"to {slots}. Each batch lasts as long as its longest answer."
    )
    return PaddedBatch(target, slots)


__all__ = ["PaddedBatch", "decoding_slots"]
