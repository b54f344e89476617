"""Drafts for the slots of continuous batching. The drafter's rows begin, move and end one by one."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..drafter.draft_layer import DraftKeyValues
from ..drafter.modeling_coral import CoralDraftModel
from ..drafter.target_adapter import TargetAdapter, placed
from ..utils.compat import hidden_states_to_ask
from .acceptance import accept_greedy, accept_walk
from .candidate_generator import nodes_of
from .costs.pace import AnyCosts, Pace
from .costs.tables import draft_costs
from .draft_levels import LevelDrafter, RotaryTable
from .draft_tree import DraftTree
from .key_values.slot_cache import SlotCache
from .key_values.store import BLOCK
from .settings import DraftSettings
from .statistics import DraftStats


logger = logging.getLogger(__name__)

# Longest time for measuring costs in a call: half of the usual, because the times of whole steps correct them.
MOST_SECONDS = 10.0
# Paces by drafter, target and number of rows (as a power of two). Later calls in this process continue with them.
_PACES: WeakKeyDictionary[CoralDraftModel, WeakKeyDictionary[PreTrainedModel, dict[int, Pace]]] = WeakKeyDictionary()


class SlotDrafts:
    """Steps a [`SlotCache`] with draft trees when they save time.

    Every slot's rows are at the front of the drafter's cache. New rows are written after those of the longest slot, like
    drafts, and then moved to the end of their slot. Features, those of prompts too, are kept until the next draft: while
    drafting pauses, the drafter does not run.

    Greedy steps are timed as a whole, plain ones and drafted ones, because the costs of forward passes leave out what slots
    add to a step. Sampled steps are not: their draws depend on which steps draft, and equal seeds must give equal samples.

    Attributes:
        on (`bool`): whether slots draft, so that they need [`step`], and [`take`] for their prompts.

    Args:
        cache ([`SlotCache`]), drafter ([`CoralDraftModel`])
        costs ([`DraftCosts`] or [`MeasuredCosts`], *optional*): times of a step; None: measure them on this machine.

    Raises:
        ValueError: if drafter and target do not belong together.
    """

    def __init__(self, cache: SlotCache, drafter: CoralDraftModel, costs: AnyCosts | None = None):
        target: PreTrainedModel = cache.target
        self.cache, self.drafter = cache, drafter
        self.adapter = TargetAdapter(target, drafter.config.target_feature_layers)
        self.adapter.check_drafter(drafter.config)
        self.states = hidden_states_to_ask(self.adapter.target, self.adapter.feature_layers)
        settings = replace(DraftSettings.resolve(drafter.config), draft_cost_aware=True, draft_stock_loop=False)
        if settings.draft_head == "context":  # the ids of many texts would soon be most of the vocabulary
            settings = replace(settings, draft_head=None)
        head = settings.draft_head_of(drafter, self.adapter)
        self.costs = draft_costs(target, drafter, settings, MOST_SECONDS) if costs is None else costs
        self.levels = LevelDrafter(drafter, self.adapter, head, settings, self.costs)
        self.settings, self.stats = settings, DraftStats()
        self._timed = _PACES.setdefault(drafter, WeakKeyDictionary()).setdefault(target, {})
        self._untimed = Pace()
        self.device, self.dtype = self.levels.device, self.levels.dtype
        self._rotary = RotaryTable(drafter)
        self._rows = DraftKeyValues(drafter.config, BLOCK, self.dtype, self.device, cache.slots)
        self._read = [0] * cache.slots  # number of rows of each slot
        self._unread: list[list[torch.Tensor]] = [[] for _ in range(cache.slots)]  # features `[n, F]` that follow them
        self.on = False
        self._asked_at = cache.slots  # live slots at the last decision
        self.positions = getattr(target.config.get_text_config(), "max_position_embeddings", None)

    def begin(self, context: int) -> bool:
        """Decides whether all slots draft, given the length of the longest prompt. Logs the decision."""
        costs = self.costs.at(self.cache.slots, context)
        self.on = costs.can_pay
        two, first = (costs.target_ms[min(nodes, len(costs.target_ms)) - 1] for nodes in (2, 1))
        logger.warning(
            "%s slots %s. On this machine, a forward pass over two tokens per slot takes %.2f times as long as one over one token, "
            "and drafting one level takes %.2f times as long.",
            self.cache.slots,
            "draft where it saves time" if self.on else "do not draft until few are left",
            two / first,
            costs.first_level_ms / first,
        )
        return self.on

    def begin_late(self, texts: Sequence[list[int]]) -> bool:
        """Decides whether the remaining slots draft from now on, when their number has halved. If so, reads them again."""
        n = len(texts)
        if 2 * n > self._asked_at:
            return False
        self._asked_at = n
        self.on = self.costs.at(n, max(map(len, texts))).can_pay
        if self.on:
            self.cache.read(range(n), texts, self.take, self.states)
        return self.on

    def described(self) -> dict[str, Any]:
        """Acceptance length and share of plain steps, for a report."""
        stats = self.stats
        plain = stats.plain_steps / stats.steps if stats.steps else 1.0
        return {"acceptance_length": round(stats.acceptance_length, 3), "plain_steps": round(plain, 3)}

    def take(self, slots: Sequence[int], texts: Sequence[list[int]], states: tuple[torch.Tensor, ...]) -> None:
        """Begins slots with the states of all tokens of their texts except the last. See [`SlotCache.prefill`]."""
        features = self._features(states)  # [m, L, F]
        for index, (slot, text) in enumerate(zip(slots, texts, strict=True)):
            self._read[slot] = 0
            self._unread[slot] = [features[index, : len(text) - 1]]

    def _read_texts(self, texts: Sequence[list[int]]) -> None:
        """Reads the texts of slots that were not read yet, except for the last feature, which the draft reads."""
        new = [slot for slot in range(len(texts)) if not self._read[slot] and sum(map(len, self._unread[slot])) > 1]
        for group, _ in self.cache.groups([texts[slot] for slot in new], 0):
            slots = [new[index] for index in group]
            unread = [torch.cat(self._unread[slot]) for slot in slots]
            counts = [len(features) for features in unread]
            width = max(counts) - 1
            ids = [(texts[slot][1:count] + [0] * width)[:width] for slot, count in zip(slots, counts, strict=True)]
            rows = DraftKeyValues(self.drafter.config, width, self.dtype, self.device, len(slots))
            features = pad_sequence(unread, batch_first=True)[:, :width]  # [m, width, F]
            projected = self.drafter.project_features(features.to(self.dtype))
            embeddings = self.levels.embed(torch.tensor(ids, device=self.cache.device))
            self.drafter.draft(embeddings, projected, None, rows, 0, None, self._rotary.rows(0, width))
            self._reserve(width)
            self._rows.keys[slots, :, :width] = rows.keys[:, :, :width]
            self._rows.values[slots, :, :width] = rows.values[:, :, :width]
            for slot, count, features in zip(slots, counts, unread, strict=True):
                # a copy, so that the others can be freed
                self._read[slot], self._unread[slot] = count - 1, [features[-1:].clone()]

    def move(self, source: int, destination: int) -> None:
        """Moves slot `source` into slot `destination`."""
        length = self._read[destination] = self._read[source]
        self._unread[destination] = self._unread[source]
        for states in (self._rows.keys, self._rows.values):
            states[destination, :, :length] = states[source, :, :length]

    def step(
        self,
        texts: Sequence[list[int]],
        sample: Callable[[torch.Tensor], torch.Tensor],
        greedy: bool,
        room: Sequence[int],
        eos_ids: Any,
    ) -> list[list[int]]:
        """One forward pass of the target over the first slots, with or without drafts.

        Args:
            texts (`Sequence[list[int]]`): the text of each slot so far.
            sample (`Callable`): logits `[m, V]` -> tokens `[m]`.
            greedy (`bool`): `sample` is the argmax.
            room (`Sequence[int]`): the number of tokens that each slot may still get, at least one.
            eos_ids: tokens that end a text.

        Returns:
            `list[list[int]]`: the new tokens of each slot, up to its end.
        """
        n, context = len(texts), max(map(len, texts))
        depth = min(self.settings.max_levels, max(room) - 1)
        rule = self.levels.rule_at(n, context)
        pace = self._pace(n, greedy)
        # after the rule, which may measure costs: the step is timed from here
        plain = rule is None or not pace.drafts(rule.costs) or depth < 1
        tree = self.cache.roots(n) if plain else self._propose(texts, depth, rule)
        outputs = self.cache.verify(tree, self.positions, output_hidden_states=self.states)
        counts = [0] * n

        def stop(rows: list[int], chosen: list[int]) -> list[bool]:
            for row in rows:
                counts[row] += 1
            return [t in eos_ids or counts[row] >= room[row] for row, t in zip(rows, chosen, strict=True)]

        if greedy:
            logits = outputs.logits
            choices = sample(logits.flatten(0, 1)).view(logits.shape[:2]).to(tree.tokens.device)  # [n, N]
            paths, tokens = accept_greedy(tree, choices)
            ends = [
                next((i for i, t in enumerate(new, 1) if t in eos_ids or i >= most), len(new))
                for new, most in zip(tokens, room, strict=True)
            ]
            paths, tokens = ([row[:end] for row, end in zip(rows, ends, strict=True)] for rows in (paths, tokens))
        else:
            paths, tokens = accept_walk(tree, lambda rows, nodes: sample(outputs.logits[rows, nodes]).tolist(), stop)
        self.cache.keep(paths, [new[-1] for new in tokens])
        features = self._features(outputs.hidden_states, None if tree.num_nodes == 1 else paths)
        for slot, path in enumerate(paths):
            self._unread[slot].append(features[slot, : len(path)])
        for path, depth in zip(paths, tree.row_depths(), strict=True):
            self.stats.add_step(depth, len(path) - 1, plain=plain)
        pace.add(tree.promise, sum(len(path) for path in paths) / n - 1)
        return tokens

    def _pace(self, n: int, greedy: bool) -> Pace:
        """The pace of steps of about `n` rows."""
        if not greedy:
            return self._untimed
        size = (n - 1).bit_length()
        if size not in self._timed:
            self._timed[size] = Pace(perf_counter)
        return self._timed[size]

    def _features(self, states: tuple[torch.Tensor, ...], paths: list[list[int]] | None = None) -> torch.Tensor:
        """The target's features `[n, L, F]`, only of the accepted nodes if paths are given."""
        found = list(states)
        for layer in set(self.adapter.feature_layers):
            found[layer] = placed(found[layer] if paths is None else nodes_of(found[layer], paths), self.device)
        return self.adapter.features_of(tuple(found))

    def _reserve(self, end: int) -> None:
        if end > self._rows.max_length:
            size = -(-max(end, 2 * self._rows.max_length) // BLOCK) * BLOCK
            grown = DraftKeyValues(self.drafter.config, size, self.dtype, self.device, self.cache.slots)
            grown.keys[:, :, : self._rows.max_length] = self._rows.keys
            grown.values[:, :, : self._rows.max_length] = self._rows.values
            self._rows = grown

    def _propose(self, texts: Sequence[list[int]], depth: int, rule: Any) -> DraftTree:
        """Reads the new features and drafts."""
        n = len(texts)
        self._read_texts(texts)
        unread = [torch.cat(self._unread[slot]) for slot in range(n)]
        counts, read = [len(features) for features in unread], self._read[:n]
        width, longest = max(1, *counts), max(read)
        self._reserve(longest + width + depth * self.settings.draft_top_k)
        rows = copy.copy(self._rows)
        rows.keys, rows.values, rows.length = self._rows.keys[:n], self._rows.values[:n], longest
        features = pad_sequence(unread, batch_first=True)  # [n, width, F]
        if not features.shape[1]:  # all prompts have one token: their first drafts have no context
            features = features.new_zeros(n, 1, features.shape[2])
        new = [
            (text[start + 1 : start + 1 + count] + [0] * width)[:width]
            for text, start, count in zip(texts, read, counts, strict=True)
        ]
        device = self.device
        steps = torch.arange(width, device=device)
        begin, count = torch.tensor([read, counts], device=device)[..., None].unbind(0)  # [n, 1]
        before = torch.arange(longest, device=device) < begin  # [n, longest]
        valid = steps < count  # [n, width]
        among = (steps <= steps[:, None]) & valid[:, None] | (steps == steps[:, None])  # [n, width, width]
        mask = torch.cat([before[:, None].expand(-1, width, -1), among], dim=-1)[:, None]
        hidden, feature = self.drafter.draft(
            self.levels.embed(torch.tensor(new, device=self.cache.device)),
            self.drafter.project_features(features.to(self.dtype)),
            None,
            rows,
            longest,
            mask,
            self._rotary.at(begin + steps, longest + width),
        )
        last = [[max(number - 1, 0)] for number in counts]
        hidden, feature = nodes_of(hidden, last), nodes_of(feature, last)
        self._move_new(rows, read, counts, longest)
        for slot in range(n):
            self._read[slot] += counts[slot]
            self._unread[slot] = [unread[slot][:0]]
        rows.length = max(self._read[:n])
        filled = torch.arange(rows.length, device=device) < begin + count  # [n, length]
        places = torch.tensor([len(text) - 1 for text in texts], device=device)[:, None]
        rotary = self._rotary.at(places + torch.arange(depth, device=device), max(map(len, texts)) + depth)
        return self.levels.draft(self.cache.roots(n).tokens, hidden, feature, rotary, rows, filled, depth, rule)

    def _move_new(self, rows: DraftKeyValues, read: Sequence[int], counts: Sequence[int], start: int) -> None:
        """Moves each slot's new rows from after the longest slot to the slot's own end."""
        moves = [
            (slot, start + index, end + index)
            for slot, (end, count) in enumerate(zip(read, counts, strict=True))
            for index in range(count)
            if end != start
        ]
        if moves:
            slots, sources, places = torch.tensor(moves, device=self.device).T
            for states in (rows.keys, rows.values):
                states[slots, :, places] = states[slots, :, sources]


__all__ = ["SlotDrafts"]
