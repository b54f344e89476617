"""Slots for continuous batching: one key-value buffer whose rows have lengths of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ...utils.compat import cache_kwarg
from ...utils.hardware import check_one_device


_KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")
# Prompts are prefilled together up to so many padded tokens: enough for a full matrix product, little enough memory.
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}
# The buffer grows by so many positions when the longest row asks for it: most runs never need its full length.
_GROWTH = 128


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slots, heads, max_length, head_dim]`; [`SlotCache`] says where to write."""

    is_sliding = False

    def __init__(self, owner: "SlotCache"):
        super().__init__()
        self.owner = owner
        self.prefix: Any = None  # two tensors, of the shared prefix, [1, heads, P, d]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self._grown(None, key_states), self._grown(None, value_states)
        self.is_initialized = True

    def _grown(self, buffer: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
        """A buffer with room for the longest row, holding what `buffer` held."""
        owner = self.owner
        length = min(owner.max_length, -(-owner.longest // _GROWTH) * _GROWTH)
        # Zeros, not empty: a masked NaN is still a NaN after the product with its zero weight.
        shape = (owner.slots, states.shape[1], length, states.shape[3])
        grown = torch.zeros(shape, dtype=states.dtype, device=states.device)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        owner, length = self.owner, key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[2] < owner.longest:
            self.keys, self.values = self._grown(self.keys, key_states), self._grown(self.values, value_states)
        if owner.prefill_slots is not None:
            # [b, h, p, d] of new prompts: nothing but the shared prefix stands before them.
            start = owner.prefill_start
            self.keys[owner.prefill_slots, :, start : start + length] = key_states
            self.values[owner.prefill_slots, :, start : start + length] = value_states
            if not start:
                return key_states, value_states
            prefix = [states.expand(key_states.shape[0], -1, -1, -1) for states in self.prefix]
            self.keys[owner.prefill_slots, :, :start] = prefix[0]
            self.values[owner.prefill_slots, :, :start] = prefix[1]
            return torch.cat([prefix[0], key_states], dim=2), torch.cat([prefix[1], value_states], dim=2)
        n, longest = key_states.shape[0], owner.longest
        self.keys[owner.rows, :, owner.positions] = key_states.squeeze(2)  # [n, h, d]
        self.values[owner.rows, :, owner.positions] = value_states.squeeze(2)
        return self.keys[:n, :, :longest], self.values[:n, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.max_length


class SlotCache(Cache):
    """
    A key-value buffer whose slots are filled, stepped and freed one by one, and the forward passes of the target over it.

    Live slots stand in front: `step(n)` decodes the slots 0 to n - 1. A slot knows its last token, whose keys and
    values are not in the buffer yet. Sliding windows are a matter of the mask: the buffer keeps every position.

    Args:
        target (`PreTrainedModel`):
            A decoder-only causal LM.
        slots (`int`):
            Rows of the buffer.
        max_length (`int`):
            Positions of each row.

    Raises:
        ValueError: if the target has layers other than full or sliding-window attention, or an attention
            implementation other than `sdpa` and `eager`, or lies on several devices.
    """

    def __init__(self, target: PreTrainedModel, slots: int, max_length: int):
        check_one_device(target)
        config = target.config.get_text_config()
        if target.config.is_encoder_decoder:
            raise ValueError(
                f"the target is an encoder-decoder ({target.config.model_type}); give a decoder-only model."
            )
        types = getattr(config, "layer_types", None)
        unknown = sorted(set(types or ()) - set(_KNOWN_LAYER_TYPES))
        if unknown:
            raise ValueError(
                f"the target has layers of type {', '.join(unknown)}; continuous batching knows "
                f"{' and '.join(_KNOWN_LAYER_TYPES)}. Answer the prompts with `generate` instead."
            )
        self.target, self.slots, self.max_length, self.device = target, slots, max_length, target.device
        self.window = getattr(config, "sliding_window", None)
        if types and "sliding_attention" not in types:
            self.window = None
        # Models of one kind of layer take one mask; those with several take a dict by type.
        self.layer_types = sorted(set(types)) if types and set(types) != {"full_attention"} else None
        implementation = config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"the target runs with attn_implementation={implementation!r}, which takes no mask per row; load it with "
                'attn_implementation="sdpa".'
            )
        self.eager = implementation == "eager"
        self.lengths = torch.zeros(slots, dtype=torch.long, device=self.device)  # positions in the buffer
        self.host_lengths = [0] * slots
        self.last_tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.all_rows = torch.arange(slots, device=self.device)
        self.all_positions = torch.arange(max_length, device=self.device)
        self.prefill_slots: torch.Tensor | None = None
        self.prefill_start = 0
        self.prefix: list[int] = []
        self.rows: Any = None  # tensors while a step runs
        self.positions: Any = None
        self.longest = 0
        super().__init__(layers=[_SlotLayer(self) for _ in range(config.num_hidden_layers)])

    def share_prefix(self, ids: list[int]) -> None:
        """
        Runs ids with which most prompts begin (a chat template's system text) once instead of in every prefill.

        Args:
            ids (`list[int]`):
                The prefix; a prompt that begins otherwise, or is no longer, is prefilled whole.
        """
        self.prefix = []
        if ids:
            self._prefill([0], [[*ids, 0]])  # slot 0 is free again at once
            for layer in self.layers:
                layer.prefix = tuple(states[:1, :, : len(ids)].clone() for states in (layer.keys, layer.values))
            self.prefix = list(ids)

    def prefill(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """
        Fills slots with prompts, all but the last token of each: that one goes through the first step, so that no
        prefill needs logits and right padding does no harm (what it leaves in the buffer is masked, then overwritten).

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
                self._prefill(group_slots, group_prompts, start if shared else 0)

    def _prefill(self, slots: list[int], prompts: list[list[int]], start: int = 0) -> None:
        """Prompts whose first `start` tokens are the shared prefix."""
        index = torch.tensor(slots, device=self.device)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.host_lengths[slot] = len(prompt) - 1
        self.lengths[index] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        self.last_tokens[index] = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
        end = max(len(prompt) for prompt in prompts) - 1
        width = end - start
        if width == 0:
            return
        rows = [prompt[start:-1] + [0] * (end + 1 - len(prompt)) for prompt in prompts]
        positions = self.all_positions[start:end]
        # Without a mask `sdpa` takes its causal path, which a window within which all prompts fit does not change.
        mask = None
        if start or self.eager or (self.window is not None and end > self.window):
            distance = positions[:, None] - self.all_positions[None, :end]
            mask = self._mask(distance.expand(len(slots), 1, width, end))
        self.prefill_slots, self.prefill_start, self.longest = index, start, end
        try:
            self.target(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=mask,
                position_ids=positions.expand(len(slots), width),
                use_cache=True,
                logits_to_keep=1,
                **cache_kwarg(self),
            )
        finally:
            self.prefill_slots = None

    def step(self, n: int) -> torch.Tensor:
        """
        Runs the last token of the first `n` slots through the target.

        Args:
            n (`int`):
                Live slots.

        Returns:
            `torch.Tensor` of shape `(n, V)`: the logits of the next token.
        """
        self.rows, self.positions = self.all_rows[:n], self.lengths[:n]
        self.longest = max(self.host_lengths[:n]) + 1
        distance = self.positions[:, None] - self.all_positions[None, : self.longest]  # [n, longest]
        logits = self.target(
            input_ids=self.last_tokens[:n, None],
            attention_mask=self._mask(distance[:, None, None]),
            position_ids=self.positions[:, None],
            use_cache=True,
            logits_to_keep=1,
            **cache_kwarg(self),
        ).logits
        return logits[:, -1]  # [n, V]

    def append(self, tokens: torch.Tensor) -> None:
        """Takes the tokens that were chosen from the logits of the last `step`, shape `(n,)`."""
        n = tokens.shape[0]
        self.last_tokens[:n] = tokens
        self.lengths[:n] += 1
        for slot in range(n):
            self.host_lengths[slot] += 1

    def move(self, source: int, destination: int) -> None:
        """Copies slot `source` into slot `destination`."""
        length = self.host_lengths[source]
        for layer in self.layers:
            layer.keys[destination, :, :length] = layer.keys[source, :, :length]
            layer.values[destination, :, :length] = layer.values[source, :, :length]
        self.lengths[destination] = self.lengths[source]
        self.last_tokens[destination] = self.last_tokens[source]
        self.host_lengths[destination] = length

    def _mask(self, distance: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks from `distance`, query position minus key position, `[n, 1, queries, keys]`."""
        causal = distance >= 0

        def finish(mask: torch.Tensor) -> torch.Tensor:
            # `eager` adds its mask. `sdpa` takes either; on a CPU it would turn a bool mask into this in every layer.
            if not self.eager and self.device.type != "cpu":
                return mask
            dtype = self.target.dtype
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

        sliding = causal & (distance < self.window) if self.window is not None else causal
        if self.layer_types is None:
            return finish(sliding)
        return {kind: finish(sliding if kind == "sliding_attention" else causal) for kind in self.layer_types}
