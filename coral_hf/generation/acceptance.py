"""Acceptance of drafted tokens, greedy or sampled, on plain tensors. Every row of a batch walks down its own tree."""

from collections.abc import Callable

import torch

from .draft_tree import DraftTree


def accept_greedy(tree: DraftTree, choices: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Walks down from the root while a child equals the target's choice at its parent.

    This runs on the host after one transfer, because every step of the walk on a GPU would wait for the GPU.

    Args:
        tree ([`DraftTree`])
        choices (`torch.LongTensor` of shape `[B, N]`): the target's argmax after each node.

    Returns:
        `tuple`: for each row, the A + 1 accepted nodes from the root on, and the tokens that they yield: the A accepted
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
    """Walks down from the root with one choice per accepted node. Lossless for sampling and for logits processors.

    At each accepted node, one token is chosen from the true target distribution. If a child has this token, the walk
    descends to it; otherwise it is the bonus token. If drafts are selected without randomness, this equals the recursive
    rejection scheme over the children (EAGLE appendix, SpecInfer theorem 4.2). A single sequence consumes random numbers
    exactly as plain decoding does.

    Args:
        tree ([`DraftTree`])
        choose: (rows that are still walking, their nodes) -> the token chosen after each node.
        stop: (these rows, their tokens) -> True for each row whose text ends.
        in_step (`bool`): all rows that have not ended yield the same number of tokens.

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
