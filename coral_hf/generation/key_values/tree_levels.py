"""Levels of draft trees: splits a module's inputs by level and joins its outputs."""

from typing import Any

import torch

from ..draft_tree import DraftTree


class TreeLevel:
    """The nodes of all rows at one depth of their trees, as one batch.

    Args:
        nodes (`list[tuple[int, int]]`): row and node of each place.
        parents (`list[int]`, *optional*): the place of each node's parent in the level before; None: the same place.
    """

    def __init__(self, nodes: list[tuple[int, int]], parents: list[int] | None):
        self.nodes, self.parents = nodes, parents
        self.places = {node: place for place, node in enumerate(nodes)}

    def behind(self, states: torch.Tensor) -> torch.Tensor:
        """A writable copy of the states `[places, ...]` before the nodes."""
        if self.parents is None:
            return states.clone(memory_format=torch.contiguous_format)
        return states[torch.tensor(self.parents, device=states.device)]

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The nodes' values `[places, 1, ...]` from `[n, N, ...]`, or from `[1, N, ...]` for all rows."""
        rows, nodes = zip(*self.nodes, strict=True)
        if len(set(nodes)) == 1 and rows == tuple(range(len(values))):
            return values[:, nodes[0] : nodes[0] + 1]
        rows = rows if len(values) > 1 else (0,) * len(rows)
        return values[list(rows), list(nodes)][:, None]


def tree_levels(tree: DraftTree) -> list[TreeLevel]:
    batch, count = tree.tokens.shape
    if tree.is_chain:
        return [TreeLevel([(row, node) for row in range(batch)], None) for node in range(count)]
    if tree.known_parents is None:
        tree.known_parents = tree.parents.tolist()
    parents = tree.known_parents
    levels = [TreeLevel([(row, 0) for row in range(batch)], None)]
    while True:
        before = levels[-1]
        nodes = [
            (row, node)
            for row in range(batch)
            for node in range(1, count)
            if (row, parents[row][node]) in before.places
        ]
        if not nodes:
            return levels
        levels.append(TreeLevel(nodes, [before.places[row, parents[row][node]] for row, node in nodes]))


def of_level(value: Any, level: TreeLevel, count: int) -> Any:
    """Selects one level from the arguments of a module over `count` nodes."""
    if isinstance(value, torch.Tensor):
        return level.of(value) if value.ndim > 1 and value.shape[1] == count else value
    if isinstance(value, dict):
        return {name: of_level(item, level, count) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(of_level(item, level, count) for item in value)
    return value


def joined_levels(outputs: list[Any], levels: list[TreeLevel]) -> Any:
    """Joins the outputs `[places, 1, ...]` of all levels to `[n, N, ...]`."""
    if isinstance(outputs[0], tuple):
        return tuple(joined_levels(list(parts), levels) for parts in zip(*outputs, strict=True))
    rows = len(levels[0].nodes)
    if all(len(level.nodes) == rows for level in levels) and all(level.parents is None for level in levels):
        return torch.cat(outputs, dim=1)
    places = [node for level in levels for node in level.nodes]
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), device=outputs[0].device)
    return torch.cat(outputs)[order].view(rows, -1, *outputs[0].shape[2:])


__all__ = ["TreeLevel", "joined_levels", "of_level", "tree_levels"]
