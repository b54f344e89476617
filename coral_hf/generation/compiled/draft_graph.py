"""One draft as a function of fixed shapes for `torch.compile`: it reads the new rows, drafts all levels, builds the tree."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...drafter.target_adapter import placed
from ..draft_tree import DraftTreeBuilder, reached


@dataclass(frozen=True)
class DraftShape:
    """The sizes that determine a graph's shapes, apart from the shapes of its inputs.

    Args:
        depth (`int`): levels drafted below the root.
        top_k (`int`): branches per node, and nodes expanded per level.
        total (`int`): nodes of the tree, root included.
        scratch (`int`): slots at the front of the drafter's cache, which drafting overwrites.
        is_chain (`bool`): draft only the most likely token of each level.
        aware (`bool`): also return the tokens expected from trees of each size.
    """

    depth: int
    top_k: int
    total: int
    scratch: int
    is_chain: bool
    aware: bool


def draft(
    drafter: Any,
    adapter: Any,
    head: Any,
    calibrate: Any,
    shape: DraftShape,
    keys: torch.Tensor,
    values: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    tokens: torch.Tensor,
    features: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Reads the new true rows and drafts from the last of them. A row's slot is `scratch` plus its position.

    Args:
        drafter ([`CoralDraftModel`]), adapter ([`TargetAdapter`]), head ([`DraftHead`])
        calibrate (`Callable`, *optional*): see [`DraftTreeBuilder`].
        shape ([`DraftShape`])
        keys, values (`torch.Tensor` of shape `[B, kv_heads, scratch + L, d]`): the drafter's cache, written in place.
        cosines, sines (`torch.Tensor` of shape `[L, d]`): RoPE of every position.
        tokens (`torch.LongTensor` of shape `[B, W]`): the new rows' tokens, each one position after its feature. The last
            of `counts` tokens is the root. Later entries are ignored.
        features (`torch.Tensor` of shape `[B, W, F]`): the target's.
        starts (`torch.LongTensor` of shape `[B]`): positions of the first new rows.
        counts (`torch.LongTensor` of shape `[B]`): the number of new rows among the W, at least 1.

    Returns:
        `tuple`: tokens, parents, depths and scores `[B, N]`, best node first, and ancestors `[B, N, N]`. If the shape is
        `aware`, also the number of tokens expected from the best 1, 2, ... nodes, `[B, N]`.
    """
    dtype, device, scratch = keys.dtype, keys.device, shape.scratch
    batch, width = tokens.shape
    columns = torch.arange(keys.shape[2] - scratch, device=device)  # [L]
    positions = starts[:, None] + torch.arange(width, device=device)  # [B, W]

    def write(slots: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor) -> None:
        for held, new in ((keys, new_keys), (values, new_values)):
            if batch == 1:
                held.index_copy_(2, slots[0], new)
            else:
                held[torch.arange(batch, device=device)[:, None], :, slots] = new.transpose(1, 2)

    def run(inputs, feature, places, slots, mask):
        """One pass of the drafter's layer over `[B, T]` rows at `places`; adds `mask` `[B, T, scratch + L]` to the scores."""
        rotary = cosines[places][:, None], sines[places][:, None]  # [B, 1, T, d]
        attention_input, residual = drafter.layer.inputs(inputs, feature, drafter.fc)
        query, key, value = drafter.layer.self_attn.project(attention_input, *rotary)
        write(slots, key, value)
        attended = drafter.layer.self_attn.attend(query, keys, values, mask[:, None])
        return drafter._outputs(drafter.layer.finish(attended, residual))

    def embedded(ids):
        return placed(adapter.embed(ids), device, dtype)

    def added(visible):
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)

    feature = drafter.project_features(placed(features, device, dtype))
    causal = F.pad(added(columns <= positions[..., None]), (scratch, 0), value=-torch.inf)  # [B, W, scratch + L]
    hidden, feature = run(embedded(tokens), feature, positions, scratch + positions, causal)
    last = (counts - 1)[:, None]  # [B, 1]
    root = tokens.gather(1, last)
    hidden, feature = _nodes(hidden, last), _nodes(feature, last)
    base = starts + counts  # [B]: the number of true rows, which is also the position of the first level
    behind = added(columns < base[:, None])[:, None]  # [B, 1, L]

    if shape.is_chain:
        chain, slots = [root], torch.arange(max(scratch, 1), device=device)
        for step in range(shape.depth):
            logits, groups, _ = head._active_logits(hidden, None)
            token = placed(head._token_ids(logits.argmax(dim=-1, keepdim=True), groups)[..., 0], device)
            chain.append(token)
            if step + 1 < shape.depth:
                written = added(slots <= step)[:scratch].expand(batch, 1, -1)
                mask = torch.cat([written, behind], dim=-1)
                slot = slots[step : step + 1].expand(batch, 1)
                hidden, feature = run(embedded(token), feature, base[:, None] + step, slot, mask)
        order = torch.arange(shape.depth + 1, device=device)
        ancestors = (order <= order[:, None]).expand(batch, -1, -1)
        depths = order.expand(batch, -1)
        ids = torch.cat(chain, dim=1)
        return ids, depths - 1, depths, torch.zeros(ids.shape, device=device), ancestors

    top_k = shape.top_k
    builder = DraftTreeBuilder(root, top_k, calibrate)

    def add_level(hidden):
        weights = None if head.router is None or hidden.shape[1] == 1 else builder.scores.exp()
        found, log_probs = head.likeliest(hidden, top_k, weights)
        return builder.add_level(placed(found, device), placed(log_probs, device))

    token, _, parent = add_level(hidden)
    feature = feature.expand(batch, top_k, -1)
    itself = added(torch.eye(top_k, dtype=torch.bool, device=device)).expand(batch, -1, -1)
    seen = torch.zeros(batch, top_k, 0, dtype=dtype, device=device)  # the scratch slots that each expanded node sees
    behind = behind.expand(-1, top_k, -1)
    for step in range(shape.depth - 1):
        seen = torch.cat([seen, itself], dim=-1)
        mask = torch.cat([F.pad(seen, (0, scratch - seen.shape[2]), value=-torch.inf), behind], dim=-1)
        slots = (step * top_k + torch.arange(top_k, device=device)).expand(batch, -1)
        places = (base[:, None] + step).expand(-1, top_k)
        hidden, feature = run(embedded(token), feature, places, slots, mask)
        token, _, parent = add_level(hidden)
        if step + 2 < shape.depth:
            seen, feature = _nodes(seen, parent), _nodes(feature, parent)
    return _ranked(builder, shape)


def _nodes(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of `[B, T, n]` at the indices `[B, W]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _ranked(builder: DraftTreeBuilder, shape: DraftShape) -> tuple[torch.Tensor, ...]:
    """[`DraftTreeBuilder.build`] with the best node first, so that the first n nodes form a tree for every n.

    Parents and depths follow from the index at which a node was stored (see [`DraftTreeBuilder`]), because a graph's
    shapes never change.
    """
    tokens, scores, ranks, expanded = builder.stored()
    best = ranks.argsort(dim=1, descending=True, stable=True)[:, : shape.total]  # [B, N]; parents precede children
    nodes = best.shape[1]
    order = torch.arange(nodes, device=best.device)
    place = torch.zeros_like(tokens).scatter(1, best, order.expand_as(best))  # stored index -> place in the ranking
    expander = (best - 1).clamp(min=0) // shape.top_k
    parents = place.gather(1, expanded.gather(1, expander))
    parents = torch.where(order == 0, -1, parents)
    later = (best - 1 - shape.top_k).clamp(min=0) // (shape.top_k * shape.top_k)
    depths = torch.where(best == 0, 0, torch.where(best <= shape.top_k, 1, 2 + later))
    itself = torch.eye(nodes, device=best.device)
    found = (
        tokens.gather(1, best),
        parents,
        depths,
        scores.gather(1, best),
        reached(parents, order, itself, builder.num_levels),
    )
    if not shape.aware:
        return found
    chances = ranks.gather(1, best)
    return *found, (chances if ranks is not scores else chances.exp()).cumsum(dim=1)


__all__ = ["DraftShape", "draft"]
