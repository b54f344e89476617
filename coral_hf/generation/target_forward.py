"""The target's side of the decode loop: the prefill, and one forward per draft tree."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..utils.compat import cache_kwarg, cache_of
from .attention.verifying import replaces_attention, verifying
from .compiled.plan import GraphPlan
from .compiled.static_forward import StaticForward
from .draft_tree import DraftTree
from .key_values.dynamic import compact_cache, tree_attention_mask
from .key_values.paths import layer_kinds, rope_limits
from .key_values.recurrent import RecurrentStates
from .key_values.recurrent_layers import crop, fit_convolutions, is_linear
from .key_values.store_forward import StoreForward, as_added


class TargetForward:
    """Runs the target for one call of `generate`, with its KV cache, masks and positions.

    Prompts are prefilled in a dynamic cache, as in plain `generate`. If there is no `paths.store_obstacle`, [`enter_store`] then
    moves them to a key-value store. Other calls stay in the dynamic cache, one sequence at a time.


    Args:
        target (`PreTrainedModel`)
        model_kwargs (`dict`): as prepared by `generate`.
        hidden_states (`list[int]` or `bool`, defaults to `True`): the hidden states that each forward pass keeps
            (`compat.hidden_states_to_ask`). Others are None in its outputs. True: all.
    """

    def __init__(self, target: PreTrainedModel, model_kwargs: dict[str, Any], hidden_states: list[int] | bool = True):
        self.target = target
        self.model_kwargs = model_kwargs
        self.hidden_states = hidden_states
        self.cache = cache_of(model_kwargs)
        mask = model_kwargs.get("attention_mask")
        # True at tokens and False at padding, for cache and prompt together; None: no padding.
        self.mask = None if mask is None else mask.bool()
        self.num_padding = 0 if mask is None else int((mask == 0).sum())  # including padding in the cache
        # With a device_map, layers may be elsewhere, but ids and masks enter at the embedding's device.
        self.device = target.get_input_embeddings().weight.device
        self.position_offset: Any = -self.num_padding
        self._in_store: StoreForward | None = None
        self._recurrent: RecurrentStates | None = None  # for targets with recurrent layers, from the first draft on
        self._replaces_attention = replaces_attention(target)
        self._offsets: list[int] | None = None  # offsets of the store's rows whose positions do not begin at 0
        self._positions: torch.Tensor | None = None  # of the prompts
        self.rope_limits = rope_limits(target.config.get_text_config())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which layers may keep tokens that their window or kernel drops, until drafts are rejected."""
        kept = {id(layer) for layer in self.cache.layers if getattr(layer, "record_past", False)}
        try:
            yield
        finally:
            for layer in self.cache.layers:
                if not getattr(layer, "record_past", False) or id(layer) in kept:
                    continue
                if getattr(layer, "is_sliding", False):
                    crop(layer, 0)  # a failed call has not done so
                if is_linear(layer):
                    fit_convolutions(layer)
                layer.record_past = False

    def prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        features_of: Callable[[tuple[torch.Tensor, ...]], torch.Tensor],
    ) -> tuple[Any, torch.Tensor]:
        """Runs the part of the prompt that is not in the cache yet, in chunks if `prefill_chunk_size` is set.

        Args:
            input_ids (`torch.LongTensor` of shape `[1, L]`)
            generation_config ([`GenerationConfig`])
            features_of (`Callable`): hidden states of a forward pass -> features `[1, n, F]`.

        Returns:
            `tuple`: the outputs of the last forward pass, with hidden states and the last position's logits, and the
            features of all new tokens.
        """
        past = self.cache.get_seq_length()
        total = getattr(generation_config, "_mask_length", -1) if self.mask is None else self.mask.shape[1]
        # With a cache, the ids are either the whole sequence, from which the new part is cut, or only new tokens.
        length = input_ids.shape[1] - past if past and total in (input_ids.shape[1], -1) else None
        inputs = self.target.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=True, **self.model_kwargs
        )
        if cache_of(inputs) is None:
            # Phi-3 and PhiMoE ignore the given cache for a text beyond their short RoPE factors, and read all of it.
            if past:
                self.cache = DynamicCache(config=self.target.config)
            inputs.update(cache_kwarg(self.cache))
        positions, ids = inputs.get("position_ids"), inputs.get("input_ids")
        expected = None if ids is None else self.cache.get_seq_length() + ids.shape[1]
        self.cache.activate_past_recording()
        for layer in self.cache.layers:
            if is_linear(layer) and not getattr(layer, "is_sliding", False):
                layer.record_past = False  # not for a whole prompt
        features = []
        for chunk in _chunks(inputs, generation_config.prefill_chunk_size):
            outputs = self.target(**{**chunk, "output_hidden_states": self.hidden_states, "return_dict": True})
            for layer in self.cache.layers:
                crop(layer, 0)
            features.append(features_of(outputs.hidden_states))
        if expected is not None and self.cache.get_seq_length() != expected:
            raise ValueError(
                f"After {expected} tokens, the KV cache of {type(self.target).__name__} contains {self.cache.get_seq_length()}, so "
                "drafts cannot be verified with it. Generate without assistant_model."
            )
        self._positions = positions
        if positions is not None:
            # The caller's own positions resume from the last one, as in plain generate.
            self.position_offset = _next_positions(positions) - self.cache.get_seq_length()
        # Without padding, the models need no mask, which would only grow with every step.
        if self.mask is not None and (not self.num_padding or self.mask.shape[1] < self.cache.get_seq_length()):
            self.mask = None
        return outputs, features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def enter_store(self, padding: list[int], plan: GraphPlan | None = None) -> None:
        """Moves the prompts without their padding (`[B]` tokens) to a key-value store, compiled if there is a plan."""
        total = self.cache.get_seq_length()
        lengths = [total - count for count in padding]
        if self._positions is not None:
            last = self._positions[:, -1].expand(len(padding)).tolist()
            offsets = [position + 1 - length for position, length in zip(last, lengths, strict=True)]
            self._offsets = offsets if any(offsets) else None
        if plan is None:
            self._in_store = StoreForward(self.target, len(padding))
        else:
            self._in_store = StaticForward(self.target, len(padding), plan, self.hidden_states)
        self._in_store.store.load(self.cache, range(len(padding)), padding, lengths)

    def most_depth(self) -> int | None:
        """The deepest tree whose nodes all have the RoPE frequencies of plain single steps; None: any depth."""
        if not self.rope_limits or self._in_store is not None:
            return None
        length = self.cache.get_seq_length()
        position = length + int(torch.as_tensor(self.position_offset).max())
        depths = [
            max(limit - 1 - place, 0)
            for limit, changes_once in self.rope_limits
            for place in (length, position)  # Phi-3 counts tokens, RoPE positions
            if place <= limit or not changes_once
        ]
        return min(depths, default=None)

    def verify(self, tree: DraftTree, input_ids: torch.Tensor | None = None, most: int | None = None) -> Any:
        """One forward pass over the nodes of every live row's tree, `[n, N]`.

        Args:
            tree ([`DraftTree`]): the roots are the last tokens of the rows.
            input_ids (`torch.LongTensor` of shape `[1, L]`, *optional*): the text, which some targets read again.
            most (`int`, *optional*): the longest text. Needed in the store, where a row may end before its tree.
        """
        if self._in_store is not None:
            return self._in_store.run(tree, self._offsets, most, output_hidden_states=self.hidden_states)
        prefix_length = self.cache.get_seq_length()
        if input_ids is not None and any(prefix_length == limit for limit, _ in self.rope_limits):
            inputs = self.target.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1, **cache_kwarg(self.cache)
            )
            if cache_of(inputs) is None:
                return self._restart(input_ids)
        whole = [kind == "full_attention" and self.mask is None for kind in layer_kinds(self.target)]
        with ExitStack() as around:
            if self._replaces_attention and not tree.is_chain:
                around.enter_context(verifying(self.target, whole))
            if any(map(is_linear, self.cache.layers)):
                self._recurrent = self._recurrent or RecurrentStates(self.target, self.cache)
                around.enter_context(self._recurrent.stepping(tree))
            return self.target(
                input_ids=tree.tokens.to(self.device),
                position_ids=tree.depths.to(self.device) + (prefix_length + self.position_offset),
                attention_mask=self._attention_mask(tree, prefix_length),
                use_cache=True,
                output_hidden_states=self.hidden_states,
                return_dict=True,
                **cache_kwarg(self.cache),
            )

    def _restart(self, input_ids: torch.Tensor) -> Any:
        """Reads the whole text again, as Phi-3 and PhiMoE do at the first token beyond their short RoPE factors."""
        mask = self._prefix_mask(input_ids.shape[1])
        positions = torch.arange(input_ids.shape[1], device=self.device)[None] + self.position_offset
        self.cache = DynamicCache(config=self.target.config)
        self.cache.activate_past_recording()
        outputs = self.target(
            input_ids=input_ids.to(self.device),
            position_ids=positions.clamp(min=0),
            attention_mask=None if mask is None else mask.long().to(self.device),
            use_cache=True,
            output_hidden_states=self.hidden_states,
            return_dict=True,
            logits_to_keep=1,
            **cache_kwarg(self.cache),
        )
        outputs.hidden_states = tuple(None if s is None else s[:, -1:] for s in outputs.hidden_states)
        return outputs

    def keep(self, paths: list[list[int]], num_nodes: int) -> None:
        """Keeps each live row's accepted nodes, root first, and drops the others of the last forward pass."""
        if self._in_store is None:
            compact_cache(self.cache, paths[0], num_nodes)
            if self._recurrent is not None:
                self._recurrent.keep(paths)
        else:
            self._in_store.store.keep(paths)

    def keep_rows(self, order: list[int]) -> None:
        """Keeps these live rows, in this order."""
        if self._in_store is not None:
            self._in_store.store.keep_rows(order)
            if self._offsets is not None:
                self._offsets = [self._offsets[row] for row in order]

    def leave_store(self) -> None:
        """Fills the dynamic cache of a single sequence again, for the caller."""
        if self._in_store is not None:
            self._in_store.store.copy_to(self.cache)
            self._in_store = None

    def _prefix_mask(self, prefix_length: int) -> torch.Tensor | None:
        if self.mask is None:
            return None
        new = prefix_length - self.mask.shape[1]
        return torch.cat([self.mask, self.mask.new_ones(1, max(new, 0))], dim=1)

    def _attention_mask(self, tree: DraftTree, prefix_length: int) -> torch.Tensor | dict[str, torch.Tensor] | None:
        prefix_mask = self._prefix_mask(prefix_length)
        if tree.is_chain:
            # Plain causal attention: the model builds its own masks, with any attention implementation.
            return (
                None
                if prefix_mask is None
                else torch.cat([prefix_mask, prefix_mask.new_ones(tree.tokens.shape)], 1).long().to(self.device)
            )
        window = getattr(self.target.config.get_text_config(), "sliding_window", None)
        by_kind: dict[str, Any] = {}
        for kind, layer in zip(layer_kinds(self.target), self.cache.layers, strict=False):
            if kind not in by_kind:  # recurrent layers take no mask
                own = window if kind == "sliding_attention" else None
                attends = isinstance(layer, DynamicLayer)
                by_kind[kind] = self._layer_mask(tree, prefix_length, layer, prefix_mask, own) if attends else None
        masks = [mask for mask in by_kind.values() if mask is not None]
        return by_kind if len(masks) > 1 else masks[0]

    def _layer_mask(self, tree, prefix_length, layer, prefix_mask, window) -> torch.Tensor:
        key_length, key_offset = layer.get_mask_sizes(tree.num_nodes)
        # A cache made without the config keeps all tokens, but the model's window still applies.
        window = layer.sliding_window if layer.is_sliding else window
        mask = tree_attention_mask(tree, prefix_length, int(key_length), int(key_offset), window, prefix_mask)
        return as_added(mask.to(self.device), self.target)


def _chunks(inputs: dict[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    """Splits a forward pass's inputs into pieces of at most `size` tokens. Each piece has the mask of all tokens before."""
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if size is None or ids is None or ids.shape[1] <= size:
        yield inputs
        return
    for start in range(0, ids.shape[1], size):
        end = min(start + size, ids.shape[1])
        chunk = {**inputs, "input_ids": ids[:, start:end]}
        if positions is not None:
            chunk["position_ids"] = positions[..., start:end]
        if mask is not None:
            chunk["attention_mask"] = mask[:, : mask.shape[1] - ids.shape[1] + end]
        yield chunk


def _next_positions(positions: torch.Tensor) -> int | torch.Tensor:
    """The position after the prompt: an int for `[1, n]`, or `[axes, 1, 1]` for the `[axes, 1, n]` of image models."""
    if positions.ndim == 2:
        return int(positions[:, -1].max()) + 1
    # Qwen-VL: three rows are time, height and width. Text after an image resumes from the largest of them, because an
    # image spans fewer positions than tokens. With four rows, the first contains the text's own positions.
    following = positions.amax(dim=(-2, -1))  # [axes]
    rotary = 1 if positions.shape[0] == 4 else 0
    following[rotary:] = following[rotary:].max()
    return following[:, None, None] + 1


__all__ = ["TargetForward"]
