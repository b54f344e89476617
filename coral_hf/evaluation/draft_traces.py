"""Drafts at every token of the target's own answers, and replays any draft size on them.

A drafter's tree at a token depends only on the text before it. The largest trees are therefore drafted once. Smaller settings
and the cost-aware rule (with the same code as in generation) are then replayed quickly: the nodes that they would keep, the
nodes that the target would accept, and the number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.prompts import Prompt, encode_first_turn
from ..drafter.configuration_coral import DERIVED
from ..generation.candidate_generator import CoralCandidateGenerator
from ..generation.settings import DraftSettings
from ..generation.statistics import DraftStats
from ..generation.tree_size import Calibration, TreeSizeRule
from .methods import measure


@dataclass
class DraftTrace:
    """All drafted nodes at P tokens of one answer, in the order in which levels were stored.

    Args:
        prompt (`str`), benchmark (`str`)
        top_k (`int`): branches per node and nodes expanded per level.
        scores (`torch.FloatTensor` of shape `[P, M]`): log path probabilities, the root first.
        parents (`torch.LongTensor` of shape `[P, M]`): -1 for the root.
        accepted (`torch.BoolTensor` of shape `[P, M]`): whether the path to the node is in the answer.
        prompt_length (`int`): tokens of the prompt.
        seconds (`float`), prefill_seconds (`float`): time of plain decoding, for the whole answer and for its first token.
    """

    prompt: str
    benchmark: str
    top_k: int
    scores: torch.Tensor
    parents: torch.Tensor
    accepted: torch.Tensor
    prompt_length: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer. The first comes from the prefill. A step starts from each of the others except the last."""
        return self.scores.shape[0] + 1

    @property
    def depth(self) -> int:
        return (self.scores.shape[1] - 1 - self.top_k) // self.top_k**2 + 1

    def level(self, depth: int) -> slice:
        """The indices of the nodes of a depth, which has `top_k` or `top_k`^2 nodes."""
        if depth == 1:
            return slice(1, 1 + self.top_k)
        start = 1 + self.top_k + (depth - 2) * self.top_k**2
        return slice(start, start + self.top_k**2)


@dataclass
class Replay:
    """The drafts of a setting at each of P tokens: levels, depth and number of kept nodes, and accepted tokens."""

    levels: torch.Tensor
    depths: torch.Tensor
    nodes: torch.Tensor
    accepted: torch.Tensor


def record_traces(
    target: Any,
    tokenizer: Any,
    drafter: Any,
    prompts: Sequence[Prompt],
    settings: DraftSettings,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[DraftTrace]:
    """Answers the first turn of every prompt plainly and drafts at each of its tokens.

    Args:
        target (`PreTrainedModel`), tokenizer, drafter ([`CoralDraftModel`])
        prompts (`list[Prompt]`)
        settings ([`DraftSettings`]): the largest depth and top_k to replay, and the head to draft with.
        max_new_tokens (`int`), temperature (`float`), seed (`int`): settings of the answers.

    Returns:
        `list[DraftTrace]`, without prompts whose answer is a single token.
    """
    traces = []
    settings = replace(settings, draft_cost_aware=False, draft_total_tokens=DERIVED, draft_stock_loop=False)
    for index, prompt in enumerate(tqdm(prompts, desc="draft at every token", unit="prompt")):
        ids = encode_first_turn(tokenizer, prompt).to(target.device)
        how: dict[str, Any] = {"temperature": temperature, "seed": seed + index}
        prefill = measure(target, ids, 1, **how)
        answer = measure(target, ids, max_new_tokens, **how)
        if len(answer.new_ids) < 2:
            continue
        sequence = torch.cat([ids, torch.tensor([answer.new_ids], device=ids.device)], dim=1)
        trace = _draft_everywhere(target, drafter, settings, sequence, ids.shape[1])
        trace.prompt, trace.benchmark = prompt.id, prompt.benchmark
        trace.seconds, trace.prefill_seconds = answer.seconds, prefill.seconds
        traces.append(trace)
    if not traces:
        raise ValueError("No prompt has an answer of two tokens or more: give other prompts.")
    return traces


@torch.inference_mode()
def _draft_everywhere(
    target: Any, drafter: Any, settings: DraftSettings, sequence: torch.Tensor, prompt_length: int
) -> DraftTrace:
    length = sequence.shape[1]
    generator = CoralCandidateGenerator(drafter, target, settings, length)
    asked = generator.adapter.output_hidden_states
    states = target(sequence, output_hidden_states=asked, use_cache=False).hidden_states
    features = generator.features_of(states)
    scores, parents, accepted = [], [], []
    for root in range(prompt_length, length - 1):
        new = features[:, :root] if root == prompt_length else features[:, root - 1 : root]
        tree = generator.propose(sequence[:, : root + 1], new)
        # an invalid token, because nothing is accepted beyond the end
        place = (root + tree.depths[0]).clamp(max=length)
        truth = torch.cat([sequence[0], sequence.new_tensor([-1])])[place]
        right = tree.tokens[0] == truth
        right[0] = True
        accepted.append((tree.ancestors[0] & ~right).sum(dim=1) == 0)  # the whole path is right
        scores.append(tree.scores[0])
        parents.append(tree.parents[0])
    rows = [torch.stack(column).cpu() for column in (scores, parents, accepted)]
    return DraftTrace("", "", settings.draft_top_k, rows[0], rows[1], rows[2], prompt_length)


def replay(
    trace: DraftTrace,
    settings: DraftSettings,
    rule: TreeSizeRule | None = None,
    calibration: Calibration | None = None,
) -> Replay:
    """Replays a smaller setting at every token of a trace.

    Args:
        trace ([`DraftTrace`])
        settings ([`DraftSettings`]): depth and top_k of at most the trace's. With a smaller top_k, a node that the smaller
            tree would have expanded is occasionally missing. Its children then count as not drafted.
        rule ([`TreeSizeRule`], *optional*), calibration ([`Calibration`], *optional*): for a cost-aware tree.

    Raises:
        ValueError: if the trace is smaller than the setting.
    """
    depth, top_k = settings.draft_depth, settings.draft_top_k
    if depth > trace.depth or top_k > trace.top_k:
        raise ValueError(
            f"The trace was drafted to depth {trace.depth} with top_k {trace.top_k}, so depth {depth} and top_k {top_k} "
            "cannot be replayed."
        )
    scores, parents = trace.scores, trace.parents.clamp(min=0)
    chances = torch.zeros_like(scores)  # 0: not drafted
    chances[:, 0] = 1.0
    opened = torch.zeros_like(trace.accepted)  # the nodes that this setting expands
    opened[:, 0] = True
    going = torch.ones(scores.shape[0], dtype=torch.bool)
    levels = torch.zeros(scores.shape[0], dtype=torch.long)
    for level in range(1, depth + 1):
        place = trace.level(level)
        above = parents[:, place]  # [P, nodes of the level]
        rank = torch.arange(above.shape[1]) % trace.top_k
        drafted = opened.gather(1, above) & (rank < top_k) & going[:, None]
        chance = scores[:, place].exp()
        if calibration is not None:
            chance = calibration(chance, level)
        chance = torch.minimum(chance, chances.gather(1, above)).masked_fill(~drafted, 0.0)
        chances[:, place] = chance
        levels += going
        best = scores[:, place].masked_fill(~drafted, float("-inf")).argsort(dim=1, descending=True, stable=True)
        best = best[:, :top_k]  # [P, W]
        opened[:, place] = torch.zeros_like(drafted).scatter(1, best, drafted.gather(1, best))
        if rule is not None and level < depth and rule.asks(level):
            open_chances = chance.gather(1, best)
            parent_chances = chances.gather(1, above.gather(1, best))
            going = going & rule.repays_level(chances[:, 1:], open_chances, parent_chances, level)
    total = settings.draft_total_tokens
    nodes = torch.full_like(levels, total)
    if rule is not None:
        for level in levels.unique().tolist():
            rows = levels == level
            nodes[rows] = rule.best_size(chances[rows, 1:], level)[0]
    order = chances[:, 1:].argsort(dim=1, descending=True, stable=True)
    kept = order.argsort(dim=1) < nodes[:, None] - 1
    kept &= chances[:, 1:] > 0
    accepted = (kept & trace.accepted[:, 1:]).sum(dim=1)
    depth_of = torch.cat(
        [torch.full((trace.level(d).stop - trace.level(d).start,), d) for d in range(1, trace.depth + 1)]
    )
    return Replay(levels, (kept * depth_of).amax(dim=1), nodes, accepted)


def walk(num_tokens: int, replayed: Replay) -> tuple[DraftStats, list[tuple[int, int]]]:
    """The steps that generation would take for an answer: statistics, and each step's (levels, nodes)."""
    stats, sizes = DraftStats(), []
    place, last = 0, num_tokens - 1
    while place < last:
        # generation does not draft beyond the longest answer
        accepted = min(int(replayed.accepted[place]), last - place - 1)
        levels, depth = (min(int(column[place]), last - place - 1) for column in (replayed.levels, replayed.depths))
        stats.add_step(depth, accepted)
        sizes.append((levels, int(replayed.nodes[place])))
        place += accepted + 1
    return stats, sizes


def replay_all(
    traces: Sequence[DraftTrace],
    settings: DraftSettings,
    rule: TreeSizeRule | None = None,
    calibration: Calibration | None = None,
) -> tuple[DraftStats, list[tuple[int, int]]]:
    """[`replay`] and [`walk`] over several answers, pooled."""
    columns = [torch.cat([getattr(t, name) for t in traces]) for name in ("scores", "parents", "accepted")]
    pooled = DraftTrace("", "", traces[0].top_k, columns[0], columns[1], columns[2])
    replayed = replay(pooled, settings, rule, calibration)
    stats, sizes, start = DraftStats(), [], 0
    for trace in traces:
        end = start + trace.num_tokens - 1
        rows = (column[start:end] for column in (replayed.levels, replayed.depths, replayed.nodes, replayed.accepted))
        one, more = walk(trace.num_tokens, Replay(*rows))
        stats, start = stats.merge(one), end
        sizes += more
    return stats, sizes


def fit_calibration(traces: Sequence[DraftTrace]) -> Calibration:
    """Fits a calibration to the observed acceptance of all drafted nodes, kept or not."""
    depths = range(1, min(trace.depth for trace in traces) + 1)
    probabilities = [torch.cat([trace.scores[:, trace.level(d)].exp().flatten() for trace in traces]) for d in depths]
    accepted = [torch.cat([trace.accepted[:, trace.level(d)].flatten() for trace in traces]) for d in depths]
    return Calibration.fit(probabilities, accepted)


__all__ = ["DraftTrace", "Replay", "fit_calibration", "record_traces", "replay", "replay_all", "walk"]
