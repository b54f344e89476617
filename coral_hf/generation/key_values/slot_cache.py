"""Slots for continuous batching: rows of the key-value store that are filled, stepped and freed one by one."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from ...utils.compat import cache_kwarg
from ...utils.hardware import check_one_device
from ..draft_tree import DraftTree
from .paths import target_obstacle
from .store_forward import StoreForward


# Prompts are prefilled together up to so many padded tokens: enough for a full matrix product, little enough memory.
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}


class SlotCache:
    """
    The target over a [`KeyValueStore`] whose rows are slots.

    Live slots stand in front: `step(n)` decodes the slots 0 to n - 1. A slot knows its last token, whose keys and
    values are not in the store yet.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM.
        slots (`int`):
            Rows of the store.

    Raises:
        ValueError: if the target is none that the store can hold (`paths.OF_TARGETS`).
    """

    def __init__(self, target: PreTrainedModel, slots: int):
        check_one_device(target)
        if target.config.is_encoder_decoder:
            raise ValueError(
                f"the target is an encoder-decoder ({target.config.model_type}); give a decoder-only model."
            )
        if (problem := target_obstacle(target)) is not None:
            raise ValueError(
                f"the target cannot be batched continuously: {problem}. Answer the prompts with `generate` instead."
            )
        self.target, self.slots, self.device = target, slots, target.device
        # Slots begin anew: sliding layers keep every place.
        self.forward = StoreForward(target, slots, rolling=False)
        self.store = self.forward.store
        self.last_tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.prefix: list[int] = []
        self.prefix_states: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer, [1, heads, P, d]

    def share_prefix(self, ids: list[int]) -> None:
        """
        Runs ids with which most prompts begin (a chat template's system text) once instead of in every prefill.

        Args:
            ids (`list[int]`):
                The prefix; a prompt that begins otherwise, or is no longer, is prefilled whole.
        """
        self.prefix = []
        if ids:
            cache = self._run([[*ids, 0]], 0)
            self.prefix_states = [(layer.keys, layer.values) for layer in cache.layers]
            self.prefix = list(ids)

    def prefill(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """
        Fills slots with prompts, all but the last token of each: that one goes through the first step, so that no
        prefill needs logits and right padding does no harm (what it leaves in the store is masked, then overwritten).

        Args:
            slots (`Sequence[int]`):
                Where the prompts go.
            prompts (`Sequence[list[int]]`):
                Their ids, of any lengths.
        """
        start = len(self.prefix)
        begins = [bool(start) and len(prompt) > start + 1 and prompt[:start] == self.prefix for prompt in prompts]
        for shared in (True, False):
            order = [index for index in range(len(prompts)) if begins[index] == shared]
            order.sort(key=lambda index: len(prompts[index]))
            while order:
                widest = len(prompts[order[-1]])
                group = order[-max(1, _PREFILL_TOKENS.get(self.device.type, 8192) // widest) :]
                del order[-len(group) :]
                group_slots, group_prompts = [slots[i] for i in group], [prompts[i] for i in group]
                self.last_tokens[group_slots] = torch.tensor(
                    [prompt[-1] for prompt in group_prompts], device=self.device
                )
                cache = self._run(group_prompts, start if shared else 0)
                self.store.load(cache, group_slots, [0] * len(group), [len(prompt) - 1 for prompt in group_prompts])

    def _run(self, prompts: list[list[int]], start: int) -> DynamicCache:
        """The keys and values of prompts without their last tokens, of which the first `start` are the shared prefix."""
        # at least one token, of a prompt of one: its slot is then empty
        end = max(2, *(len(prompt) for prompt in prompts)) - 1
        rows = [prompt[start:end] + [0] * (end - len(prompt)) for prompt in prompts]
        places = torch.arange(end, device=self.device)
        # Without a mask `sdpa` takes its causal path, which a window within which all prompts fit does not change.
        mask = None
        windows = [window for window in self.forward.kinds.values() if window is not None]
        if (
            start
            or (windows and end > min(windows))
            or self.target.config.get_text_config()._attn_implementation == "eager"
        ):
            distance = (places[start:, None] - places)[None, None]  # [1, 1, width, end]
            masks = {
                window: (distance >= 0) & (distance < (end if window is None else window))
                for window in self.forward.kinds.values()
            }
            mask = self.forward.by_kind({window: m.expand(len(prompts), -1, -1, -1) for window, m in masks.items()})
        cache = DynamicCache()  # not the config's: a window of right-padded rows would not be theirs
        if start:
            for index, states in enumerate(self.prefix_states):
                cache.update(*(part.expand(len(prompts), -1, -1, -1) for part in states), index)
        self.target(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=mask,
            position_ids=places[start:].expand(len(prompts), -1),
            use_cache=True,
            logits_to_keep=1,
            **cache_kwarg(cache),
        )
        return cache

    def step(self, n: int) -> torch.Tensor:
        """
        Runs the last token of the first `n` slots through the target.

        Args:
            n (`int`):
                Live slots.

        Returns:
            `torch.Tensor` of shape `(n, V)`: the logits of the next token.
        """
        self.store.num_rows = n
        return self.forward.run(DraftTree.chain(self.last_tokens[:n, None])).logits[:, -1]  # [n, V]

    def append(self, tokens: torch.Tensor) -> None:
        """Takes the tokens that were chosen from the logits of the last `step`, shape `(n,)`."""
        self.last_tokens[: tokens.shape[0]] = tokens
        self.store.keep([[0]] * tokens.shape[0])

    def move(self, source: int, destination: int) -> None:
        """Moves slot `source` into slot `destination`."""
        self.store.move_row(source, destination)
        self.last_tokens[destination] = self.last_tokens[source]


__all__ = ["SlotCache"]
