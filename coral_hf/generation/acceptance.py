"""Acceptance of drafted tokens, greedy or sampled, on plain tensors: every row of a batch walks down its own tree."""

from collections.abc import Callable

import torch

from .draft_tree import DraftTree


def accept_greedy(tree: DraftTree, choices: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Walks down from the root while a child equals the target's choice at its parent.

    On the host, after one transfer: every step of the walk on a GPU would wait for the GPU.

    Args:
        tree ([`DraftTree`])
        choices (`torch.LongTensor` of shape `[B, N]`): the target's argmax after each node.

    Returns:
        `tuple`: of each row the accepted nodes from the root on, A + 1 of them, and the tokens they yield: the A accepted
        drafts and the bonus token.
    """
    tokens, tree.known_parents, chosen = torch.stack([tree.tokens, tree.parents, choices]).tolist()
    return _walk(
        [_children(*row) for row in zip(tokens, tree.known_parents, strict=True)],
        lambda rows, nodes: [chosen[row][node] for row, node in zip(rows, nodes, strict=True)],
    )


def accept_walk(
    tree: DraftTree,
    choose: Callable[[list[int], list[int]], list[int]],
    stop: Callable[[list[int], list[int]], list[bool]],
    in_step: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Walks down from the root with one choice per accepted node: lossless for sampling and for logits processors.

    At each accepted node one token is chosen from the true target distribution; if a child has it the walk descends,
    else it is the bonus token. As long as the drafts were selected without randomness this equals the recursive
    rejection scheme over the children (EAGLE appendix, SpecInfer theorem 4.2), and a single sequence spends random numbers
    exactly as plain decoding does.

    Args:
        tree ([`DraftTree`])
        choose: (rows that still walk, the node of each) -> the token chosen after each.
        stop: (those rows, their tokens) -> True where the text of a row ends.
        in_step (`bool`): no row continues without the others: all rows that have not ended yield as many tokens.

    Returns:
        `tuple`: as [`accept_greedy`].
    """
    tokens, tree.known_parents = torch.stack([tree.tokens, tree.parents]).tolist()
    return _walk([_children(*row) for row in zip(tokens, tree.known_parents, strict=True)], choose, stop, in_step)


def _walk(
    children: list[dict[tuple[int, int], int]],
    choose: Callable[[list[int], list[int]], list[int]],
    stop: Callable[[list[int], list[int]], list[bool]] | None = None,
    in_step: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    paths: list[list[int]] = [[] for _ in children]
    tokens: list[list[int]] = [[] for _ in children]
    rows, nodes = list(range(len(children))), [0] * len(children)
    while rows:
        chosen = choose(rows, nodes)
        ended = [False] * len(rows) if stop is None else stop(rows, chosen)
        following: list[tuple[int, int]] = []
        for row, node, token, end in zip(rows, nodes, chosen, ended, strict=True):
            paths[row].append(node)
            tokens[row].append(token)
            if not end and (child := children[row].get((node, token))) is not None:
                following.append((row, child))
        if in_step and len(following) < len(rows) - sum(ended):
            break
        rows, nodes = [row for row, _ in following], [node for _, node in following]
    return paths, tokens


def _children(tokens: list[int], parents: list[int]) -> dict[tuple[int, int], int]:
    """(parent, token) -> the child that has it."""
    return {(parents[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}


__all__ = ["accept_greedy", "accept_walk"]
