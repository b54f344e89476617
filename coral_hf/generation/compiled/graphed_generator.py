"""The candidate generator that computes each draft in one graph."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from ...drafter.draft_layer import DraftKeyValues
from ...drafter.modeling_coral import CoralDraftModel
from ..candidate_generator import CoralCandidateGenerator, nodes_of
from ..costs.pace import AnyCosts
from ..draft_levels import RotaryTable
from ..draft_tree import DraftPromise, DraftTree
from ..lookup.lookup_nodes import Found
from ..settings import DraftSettings
from .draft_graph import DraftShape, draft
from .graphs import compiled
from .plan import GraphPlan, padded_count


class _StaticRows(DraftKeyValues):
    """The drafter's cache at a fixed address. Rows that have ended stay in it."""

    def keep_rows(self, order: list[int]) -> None:
        for held in (self.keys, self.values):
            held[: len(order)] = held[order]


@dataclass
class _Graph:
    """State that is kept between calls: the graph, and the drafter's cache that the graph addresses."""

    cache: DraftKeyValues
    rotary: tuple[torch.Tensor, ...]
    run: Callable[..., Any]


class GraphedGenerator(CoralCandidateGenerator):
    """[`CoralCandidateGenerator`] for compiled calls. The prompt is read without a graph. Each later draft is one graph.

    A draft is always as deep as the settings allow. If the text ends earlier, the stopping criteria end it. The cost-aware
    rule chooses among the nodes of that draft.

    Args:
        drafter, target, settings, max_length, num_padding, costs: as [`CoralCandidateGenerator`].
        plan ([`GraphPlan`])
    """

    def __init__(
        self,
        drafter: CoralDraftModel,
        target: PreTrainedModel,
        settings: DraftSettings,
        max_length: int,
        num_padding: int | list[int] = 0,
        costs: AnyCosts | None = None,
        *,
        plan: GraphPlan,
    ):
        super().__init__(drafter, target, settings, max_length, num_padding, costs)
        self._width = settings.max_levels + 1  # most true rows that a step can add
        aware = settings.draft_cost_aware
        scratch = (settings.max_levels - 1) * settings.draft_top_k
        self._shape = DraftShape(
            depth=settings.max_levels,
            top_k=settings.draft_top_k,
            total=settings.draft_total_tokens,
            scratch=-(-scratch // 8) * 8,  # kernels need aligned masks
            is_chain=settings.is_chain and not aware,
            aware=aware,
        )
        self._times: tuple[Any, list[float], torch.Tensor] | None = None  # from the current costs
        batch = len(self.padding)
        where = str(self.adapter.device), str(self._device), self._dtype, target.dtype
        head = settings.draft_head, settings.draft_active_groups, settings.draft_groups_per_row, settings.draft_scoring
        key = ("draft", batch, plan.length, self._shape, head, where, str(plan.options))
        self._graph: _Graph = plan.take(drafter, key, target, lambda: self._made(batch, plan))
        self._ends = [0] * batch  # number of true rows of each live row
        self._began = False

    def _made(self, batch: int, plan: GraphPlan) -> _Graph:
        slots = self._shape.scratch + plan.length
        cache = _StaticRows(self.drafter.config, slots, self._dtype, self._device, batch)
        table = RotaryTable(self.drafter)
        rotary = tuple(factors[0, 0].contiguous() for factors in table.rows(0, plan.length))
        for tensor in (cache.keys, cache.values, *rotary):
            torch._dynamo.mark_static_address(tensor)
        return _Graph(cache, rotary, compiled(draft, {**plan.options, "fullgraph": True}))

    def propose(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        max_depth: int | None = None,
        lengths: list[int] | None = None,
        counts: list[int] | None = None,
        found: Found | None = None,
    ) -> DraftTree:
        """As [`CoralCandidateGenerator.propose`]. After the first call, features are `[n, depth + 1, F]` with any `counts`.

        Graphs of fixed shapes accept no `found` nodes. Compiled calls do not use lookup.
        """
        live, longest = input_ids.shape
        lengths = [longest] * live if lengths is None else lengths
        counts = [features.shape[1]] * live if counts is None else counts
        features, counts = self._with_unread(features, counts)
        if not self._began:
            self._read_prompt(input_ids, features, lengths, counts)
            features, counts = nodes_of(features, [[count - 1] for count in counts]), [1] * live
        width = self._width
        passes = -(-max(counts) // width)  # more than one after plain steps
        for left in range(passes - 1, -1, -1):
            # each row's features for this pass; a row without any reads its first one early
            first = [max(count - (left + 1) * width, 0) for count in counts]
            ends = [max(start + 1, count - left * width) for start, count in zip(first, counts, strict=True)]
            part, read = features, [end - start for start, end in zip(first, ends, strict=True)]
            if passes > 1:
                places = [list(range(start, end)) for start, end in zip(first, ends, strict=True)]
                part = nodes_of(features, [place + [0] * (width - len(place)) for place in places])
            starts = [length - 1 - count + start for length, count, start in zip(lengths, counts, first, strict=True)]
            outputs = self._run(input_ids, part, starts, read)
        tokens, parents, depths, scores, ancestors, *promised = outputs
        size, promise = tokens.shape[1], None
        if promised:
            size, promise = self._size(promised[0][:live], live, longest)
        tokens, scores = tokens[:live, :size], scores[:live, :size]
        if self.settings.is_chain:
            tree = DraftTree.chain(tokens, scores)
        else:
            shaped = parents[:live, :size], depths[:live, :size], scores, ancestors[:live, :size, :size]
            tree = DraftTree(tokens, *shaped)
        tree.promise = promise
        return tree

    def _run(self, input_ids: torch.Tensor, features: torch.Tensor, starts: list[int], counts: list[int]) -> tuple:
        """One graph over new features `[n, T, F]`: the first `counts` of each row, whose tokens begin at `starts` in the text."""
        live, longest = input_ids.shape
        cache = self._graph.cache
        extra, width = cache.keys.shape[0] - live, self._width
        places = [start - padding for start, padding in zip(starts, self.padding, strict=True)]
        self._ends = [place + count for place, count in zip(places, counts, strict=True)]
        dead = [0] * extra
        numbers = torch.tensor([starts + dead, places + dead, counts + [1] * extra], device=self._device)
        index = numbers[0, :live, None].to(input_ids.device) + 1 + torch.arange(width, device=input_ids.device)
        tokens = F.pad(input_ids.gather(1, index.clamp(max=longest - 1)), (0, 0, 0, extra))
        features = F.pad(features, (0, 0, 0, width - features.shape[1], 0, extra))
        if self._device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        models = self.drafter, self.adapter, self.head, self.levels.calibration
        held = cache.keys, cache.values, *self._graph.rotary
        return self._graph.run(*models, self._shape, *held, tokens, features, numbers[1], numbers[2])

    def _size(self, promised: torch.Tensor, rows: int, context: int) -> tuple[int, DraftPromise]:
        """The tree that pays best, given the tokens `[n, N]` expected from the best 1, 2, ... nodes of a whole draft."""
        rule: Any = self.levels.rule_at(rows, context)
        if self._times is None or self._times[0] is not rule.costs:
            levels, most = self._shape.depth, promised.shape[1]
            # verification takes the time of the padded size
            padded = [min(padded_count(size), most) for size in range(1, most + 1)]
            times = [rule.costs.step_ms(levels, size) for size in padded]
            self._times = rule.costs, times, torch.tensor(times, device=promised.device)
        _, times, on_device = self._times
        speed, best = (promised.mean(dim=0) / on_device).max(dim=0)
        size, value = torch.stack([best.to(speed), speed]).tolist()  # the host waits
        step_ms = times[int(size)]
        return int(size) + 1, DraftPromise(max(value * step_ms - 1, 0.0), step_ms, rule.costs.target_ms[0])

    def _read_prompt(
        self, input_ids: torch.Tensor, features: torch.Tensor, lengths: list[int], counts: list[int]
    ) -> None:
        """Reads all features of each row but the last into the graph's cache. The first draft reads the last one."""
        self._began = True
        live = len(lengths)
        held, scratch = self._graph.cache, self._shape.scratch
        if max(counts) > 1:
            first = [length - 1 - count for length, count in zip(lengths, counts, strict=True)]
            with torch.inference_mode():
                before = [length - 1 for length in lengths], [count - 1 for count in counts]
                self._extend(input_ids, features[:, : max(counts) - 1], *before)
            # the eager cache begins at the first column with a token in any row, this cache at each row's own first token
            cut = max(0, min(padding - start for padding, start in zip(self.padding, first, strict=True)))
            shift = [padding - start - cut for padding, start in zip(self.padding, first, strict=True)]
            slots = torch.arange(self.cache.length, device=self._device)
            slots = slots + torch.tensor(shift, device=self._device)[:, None]  # [n, slots]
            slots = slots.clamp(0, self.cache.length - 1)[:, None, :, None]
            for ours, theirs in ((held.keys, self.cache.keys), (held.values, self.cache.values)):
                index = slots.expand(-1, theirs.shape[1], -1, theirs.shape[3])
                ours[:live, :, scratch : scratch + self.cache.length] = theirs.gather(2, index)
        self.cache, self._filled = held, None

    def features_of(
        self, hidden_states: tuple[torch.Tensor, ...], paths: list[list[int]] | None = None
    ) -> torch.Tensor:
        """As [`CoralCandidateGenerator.features_of`], with shape `[B, depth + 1, F]` for paths of any length."""
        if paths is not None:
            paths = [path + [0] * (self._width - len(path)) for path in paths]
        return super().features_of(hidden_states, paths)

    def keep_rows(self, order: list[int]) -> None:
        self._ends = [self._ends[row] for row in order]
        super().keep_rows(order)

    def keep(self, cache: Cache, input_ids: torch.Tensor, features: torch.Tensor) -> None:
        if not self._began:
            super().keep(cache, input_ids, features)
            return
        features, _ = self._with_unread(features, [features.shape[1]])
        end, scratch, held = self._ends[0], self._shape.scratch, self._graph.cache
        own = DraftKeyValues(self.drafter.config, end + self._width, self._dtype, self._device)
        for ours, theirs in ((own.keys, held.keys), (own.values, held.values)):
            ours[:, :, :end] = theirs[:, :, scratch : scratch + end]
        own.length = end
        self.cache = own
        super().keep(cache, input_ids, features[:, : cache.get_seq_length() - self.padding[0] - end])


def generator_of(plan: GraphPlan | None) -> Callable[..., CoralCandidateGenerator]:
    """The candidate generator of a call, compiled or not. Arguments are those of [`CoralCandidateGenerator`]."""
    return CoralCandidateGenerator if plan is None else partial(GraphedGenerator, plan=plan)


__all__ = ["GraphedGenerator", "generator_of"]
