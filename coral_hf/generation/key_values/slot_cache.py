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


# a function of slots, their texts, and each layer's states `[n, L, H]` of all tokens but the last
States = Callable[[Sequence[int], Sequence[list[int]], tuple[torch.Tensor, ...]], None]
# Prompts are prefilled together up to this many padded tokens: enough for full matrix products, without much memory.
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}


class SlotCache:
    """
    Runs the target on a [`KeyValueStore`] whose rows are slots.

    Live slots come first: `step(n)` decodes the slots 0 to n - 1. A slot remembers its last token, whose keys and
    values are not in the store yet.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM.
        slots (`int`):
            Rows of the store.

    Raises:
        ValueError: if the store does not support the target (`paths.OF_TARGETS`).
    """

    def __init__(self, target: PreTrainedModel, slots: int):
        check_one_device(target)
        if target.config.is_encoder_decoder:
            raise ValueError(
                f"the target is an encoder-decoder ({target.config.model_type}); give a decoder-only model."
            )
        if (problem := target_obstacle(target)) is not None:
            raise ValueError(
                f"the target does not support continuous batching: {problem}. Answer the prompts with `generate` instead."
            )
        self.target, self.slots, self.device = target, slots, target.device
        # On an accelerator, a forward pass over many prompts costs as much as over one. There, prompts wait for each other.
        self.refill_at = slots - (1 if self.device.type == "cpu" else max(1, slots // 8))
        # Slots are reused, so sliding layers keep every place.
        self.forward = StoreForward(target, slots, rolling=False)
        self.store = self.forward.store
        self.last_tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.prefix: list[int] = []
        self.prefix_states: list[tuple[torch.Tensor, torch.Tensor]] = []  # for each layer, [1, heads, P, d]
        self.prefix_hidden: tuple[torch.Tensor, ...] = ()  # for each asked layer, [1, P, H]

    def share_prefix(self, ids: list[int], states: list[int] | bool = False) -> None:
        """
        Runs a prefix that most prompts share (a chat template's system text) once instead of in every prefill.

        Args:
            ids (`list[int]`):
                The prefix. A prompt that does not begin with it, or is not longer, is prefilled whole.
            states (`list[int]` or `bool`):
                The layers whose hidden states a later `take` needs; True: all.
        """
        self.prefix = []
        if ids:
            cache, self.prefix_hidden = self._run([[*ids, 0]], 0, states)
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
        Fills slots with prompts, except for the last token of each. The first step reads that token, so that a prefill
        needs no logits. Right padding is harmless: its entries in the store are masked and later overwritten.

        Args:
            slots (`Sequence[int]`):
                Where the prompts go.
            prompts (`Sequence[list[int]]`):
                Their ids, of any lengths.
            take (`Callable`, *optional*):
                Receives the hidden states of each forward pass, after those of the shared prefix.
            states (`list[int]` or `bool`):
                The layers whose hidden states are needed; True: all. A shared prefix must have been run with the same.
        """
        for group, start in self.groups(prompts, len(self.prefix)):
            group_slots, group_prompts = [slots[i] for i in group], [prompts[i] for i in group]
            self.last_tokens[group_slots] = torch.tensor([prompt[-1] for prompt in group_prompts], device=self.device)
            cache, found = self._run(group_prompts, start, states)
            self.store.load(cache, group_slots, [0] * len(group), [len(prompt) - 1 for prompt in group_prompts])
            if take is not None:
                if start:
                    found = tuple(
                        new if new is None else torch.cat([old.expand(len(group), -1, -1), new], dim=1)
                        for old, new in zip(self.prefix_hidden, found, strict=True)
                    )
                take(group_slots, group_prompts, found)

    def read(self, slots: Sequence[int], texts: Sequence[list[int]], take: States, states: list[int] | bool) -> None:
        """Runs texts again only for their hidden states. Slots stay unchanged. Arguments are those of [`prefill`]."""
        for group, _ in self.groups(texts, 0):
            group_texts = [texts[i] for i in group]
            take([slots[i] for i in group], group_texts, self._run(group_texts, 0, states)[1])

    def groups(self, prompts: Sequence[list[int]], start: int) -> Iterator[tuple[list[int], int]]:
        """The groups of prompts to run together, longest first, with the length of the prefix that they share."""
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
        """Keys, values and states of prompts without their last tokens. The first `start` tokens are the shared prefix."""
        # at least one token, even for a prompt of one token, whose slot stays empty
        end = max(2, *(len(prompt) for prompt in prompts)) - 1
        rows = [prompt[start:end] + [0] * (end - len(prompt)) for prompt in prompts]
        places = torch.arange(end, device=self.device)
        # Without a mask, `sdpa` takes its causal path. That is exact if all prompts fit into the window.
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
        cache = DynamicCache()  # without the config, because windows would be wrong for right-padded rows
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
        """Trees that consist of the last tokens of the first `n` slots."""
        return DraftTree.chain(self.last_tokens[:n, None])

    def verify(self, tree: DraftTree, most: int | None = None, **kwargs: Any) -> Any:
        """
        Runs the trees of the first slots through the target; [`keep`] follows.

        Args:
            tree ([`DraftTree`]):
                `(n, N)` nodes. The roots are the slots' last tokens.
            most (`int`, *optional*):
                The longest text.
            kwargs:
                Passed to the target's forward.
        """
        self.store.num_rows = len(tree.tokens)
        return self.forward.run(tree, None, most, **kwargs)

    def keep(self, paths: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
        """Keeps each slot's accepted nodes, root first, and appends the token after the last of them."""
        self.last_tokens[: len(tokens)] = torch.tensor(tokens, device=self.device)
        self.store.keep(paths)

    def append(self, tokens: torch.Tensor) -> None:
        """Appends the tokens of shape `(n,)` that were chosen from the logits of the last `step`."""
        self.last_tokens[: tokens.shape[0]] = tokens
        self.store.keep([[0]] * tokens.shape[0])

    def move(self, source: int, destination: int) -> None:
        """Moves slot `source` into slot `destination`."""
        self.store.move_row(source, destination)
        self.last_tokens[destination] = self.last_tokens[source]


__all__ = ["SlotCache"]
