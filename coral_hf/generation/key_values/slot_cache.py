"""Slots for continuous batching: rows of the key-value store that are filled, stepped and freed one by one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ...utils.compat import cache_kwarg
from ...utils.hardware import check_one_device
from ..draft_tree import DraftTree
from .paths import target_obstacle
from .store_forward import StoreForward


# what takes slots, their texts and the states `[n, L, H]` of each layer, of all tokens but the last
States = Callable[[Sequence[int], Sequence[list[int]], tuple[torch.Tensor, ...]], None]
# Prompts are prefilled together up to this many padded tokens: enough for a full matrix product, little enough memory.
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}


class SlotCache:
    """
    The target over a [`KeyValueStore`] whose rows are slots.

    Live slots are in front: `step(n)` decodes the slots 0 to n - 1. A slot knows its last token, whose keys and
    values are not in the store yet.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM.
        slots (`int`):
            Rows of the store.

    Raises:
        ValueError: if the store cannot hold the target (`paths.OF_TARGETS`).
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
        # A forward on an accelerator costs the same for one prompt as for many: there, prompts wait for each other.
        self.refill_at = slots - (1 if self.device.type == "cpu" else max(1, slots // 8))
        # Slots start again: sliding layers keep every place.
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
                The prefix; a prompt that begins otherwise, or is not longer, is prefilled whole.
        """
        self.prefix = []
        if ids:
            cache, _ = self._run([[*ids, 0]], 0)
            self.prefix_states = [(layer.keys, layer.values) for layer in cache.layers]
            self.prefix = list(ids)

    def prefill(
        self,
        slots: Sequence[int],
        prompts: Sequence[list[int]],
        take: States | None = None,
        states: list[int] | bool = False,
    ) -> None:
        """
        Fills slots with prompts, all but the last token of each: that one goes through the first step, so that no
        prefill needs logits and right padding does no harm (what it leaves in the store is masked, then overwritten).

        Args:
            slots (`Sequence[int]`):
                Where the prompts go.
            prompts (`Sequence[list[int]]`):
                Their ids, of any lengths.
            take (`Callable`, *optional*):
                Gets the hidden states of each forward; without a shared prefix only.
            states (`list[int]` or `bool`):
                Those that are wanted.
        """
        for group, start in self._groups(prompts, len(self.prefix)):
            group_slots, group_prompts = [slots[i] for i in group], [prompts[i] for i in group]
            self.last_tokens[group_slots] = torch.tensor([prompt[-1] for prompt in group_prompts], device=self.device)
            cache, found = self._run(group_prompts, start, states)
            self.store.load(cache, group_slots, [0] * len(group), [len(prompt) - 1 for prompt in group_prompts])
            if take is not None:
                take(group_slots, group_prompts, found)

    def read(self, slots: Sequence[int], texts: Sequence[list[int]], take: States, states: list[int] | bool) -> None:
        """Runs texts again for their hidden states alone, and leaves the slots as they are; arguments of [`prefill`]."""
        for group, _ in self._groups(texts, 0):
            group_texts = [texts[i] for i in group]
            take([slots[i] for i in group], group_texts, self._run(group_texts, 0, states)[1])

    def _groups(self, prompts: Sequence[list[int]], start: int) -> Iterator[tuple[list[int], int]]:
        """Which prompts are run together, longest first, and how many of their tokens are the shared prefix of `start`."""
        begins = [bool(start) and len(prompt) > start + 1 and prompt[:start] == self.prefix for prompt in prompts]
        for shared in (True, False):
            order = [index for index in range(len(prompts)) if begins[index] == shared]
            order.sort(key=lambda index: len(prompts[index]))
            while order:
                widest = len(prompts[order[-1]])
                group = order[-max(1, _PREFILL_TOKENS.get(self.device.type, 8192) // widest) :]
                del order[-len(group) :]
                yield group, start if shared else 0

    def _run(
        self, prompts: list[list[int]], start: int, states: list[int] | bool = False
    ) -> tuple[DynamicCache, tuple[torch.Tensor, ...]]:
        """The keys, values and states of prompts without their last tokens, of which `start` are the shared prefix."""
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
            for index, held in enumerate(self.prefix_states):
                cache.update(*(part.expand(len(prompts), -1, -1, -1) for part in held), index)
        outputs = self.target(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=mask,
            position_ids=places[start:].expand(len(prompts), -1),
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=states,
            **cache_kwarg(cache),
        )
        return cache, outputs.hidden_states or ()

    def step(self, n: int) -> torch.Tensor:
        """
        Runs the last token of the first `n` slots through the target.

        Args:
            n (`int`):
                Live slots.

        Returns:
            `torch.Tensor` of shape `(n, V)`: the logits of the next token.
        """
        return self.verify(self.roots(n)).logits[:, -1]  # [n, V]

    def roots(self, n: int) -> DraftTree:
        """Trees of the last tokens of the first `n` slots alone."""
        return DraftTree.chain(self.last_tokens[:n, None])

    def verify(self, tree: DraftTree, most: int | None = None, **kwargs: Any) -> Any:
        """
        Runs the trees of the first slots through the target; [`keep`] follows.

        Args:
            tree ([`DraftTree`]):
                `(n, N)` nodes, of which the roots are the slots' last tokens.
            most (`int`, *optional*):
                No text gets longer.
            kwargs:
                For the target's forward.
        """
        self.store.num_rows = len(tree.tokens)
        return self.forward.run(tree, None, most, **kwargs)

    def keep(self, paths: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
        """Keeps each slot's accepted nodes, root first, and takes the token after the last of them."""
        self.last_tokens[: len(tokens)] = torch.tensor(tokens, device=self.device)
        self.store.keep(paths)

    def append(self, tokens: torch.Tensor) -> None:
        """Takes the tokens that were chosen from the logits of the last `step`, shape `(n,)`."""
        self.last_tokens[: tokens.shape[0]] = tokens
        self.store.keep([[0]] * tokens.shape[0])

    def move(self, source: int, destination: int) -> None:
        """Moves slot `source` into slot `destination`."""
        self.store.move_row(source, destination)
        self.last_tokens[destination] = self.last_tokens[source]


__all__ = ["SlotCache"]
