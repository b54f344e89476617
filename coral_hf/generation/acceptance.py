"""Acceptance of drafted tokens, greedy or sampled, on plain tensors."""

from collections.abc import Callable

import torch

from .draft_tree import DraftTree


def accept_greedy(tree: DraftTree, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Walks down from the root while a child equals the target's choice at its parent.

    On the host, after one transfer: every step of the walk on a GPU would wait for the GPU.

    Args:
        tree ([`DraftTree`]): batch of one.
        choices (`torch.LongTensor` of shape `[1, N]`): the target's argmax after each node.

    Returns:
        `tuple`: accepted node indices from the root on, `[1, A + 1]` on the CPU (what they index lies on several devices,
        and code decides by them), and the tokens they yield, `[1, A + 1]`: the A accepted drafts and the bonus token.
    """
    tokens, parents, chosen = torch.stack([tree.tokens[0], tree.parents[0], choices[0]]).tolist()
    children = _children(tokens, parents)
    path = [0]
    while (child := children.get((path[-1], chosen[path[-1]]))) is not None:
        path.append(child)
    return torch.tensor([path]), choices.new_tensor([[chosen[node] for node in path]])


def accept_walk(
    tree: DraftTree, choose: Callable[[int, int], torch.Tensor], stop: Callable[[torch.Tensor], bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walks down from the root with one choice per accepted node: lossless for sampling and for logits processors.

    At each accepted node one token is chosen from the true target distribution; if a child holds it the walk descends,
    else it is the bonus token. As long as the drafts were selected without randomness this equals the recursive
    rejection scheme over the children (EAGLE appendix, SpecInfer theorem 4.2) and spends random numbers exactly as
    plain decoding does.

    Args:
        tree ([`DraftTree`]): batch of one.
        choose: (node index, number of tokens chosen before) -> chosen token `[1]`.
        stop: called with each chosen token; True ends the walk (end of sequence, budget, stop strings).

    Returns:
        `tuple`: as [`accept_greedy`].
    """
    children = _children(*torch.stack([tree.tokens[0], tree.parents[0]]).tolist())
    path: list[int] = []
    chosen: list[torch.Tensor] = []
    node = 0
    while True:
        token = choose(node, len(chosen))
        path.append(node)
        chosen.append(token)
        if stop(token):
            break
        child = children.get((node, int(token)))
        if child is None:
            break
        node = child
    return torch.tensor([path]), torch.stack(chosen, dim=1)


def _children(tokens: list[int], parents: list[int]) -> dict[tuple[int, int], int]:
    """(parent, token) -> the child that holds it."""
    return {(parents[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}


__all__ = ["accept_greedy", "accept_walk"]
