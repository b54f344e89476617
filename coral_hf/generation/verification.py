"""Acceptance of drafted tokens, greedy or sampled, on plain tensors."""

from collections.abc import Callable

import torch

from .draft_tree import DraftTree


def accept_greedy(tree: DraftTree, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Walks down from the root while a child equals the target's choice at its parent.

    Without a step per node: a node is accepted if it and all its ancestors match, and the deepest accepted node is
    unique because children of one node hold different tokens.

    Args:
        tree ([`DraftTree`]): batch of one.
        choices (`torch.LongTensor` of shape `[1, N]`): the target's argmax after each node.

    Returns:
        `tuple`: accepted node indices from the root on, `[1, A + 1]`, and the tokens they yield, `[1, A + 1]`: the A
        accepted drafts and the bonus token.
    """
    match = tree.tokens == choices.gather(1, tree.parents.clamp(min=0))  # [1, N]
    match[:, 0] = True
    accepted = (match[:, None] | ~tree.ancestors).all(dim=-1)  # [1, N]
    depth = torch.where(accepted, tree.depths, -1)
    last = depth.argmax(dim=1)  # [1]
    path = tree.ancestors[0, last[0]].nonzero().T  # [1, A + 1], parents precede children
    return path, choices.gather(1, path)


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
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    children: dict[tuple[int, int], int] = {}
    for node in range(len(tokens) - 1, 0, -1):
        children[parents[node], tokens[node]] = node
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
    device = tree.tokens.device
    return torch.tensor([path], device=device), torch.stack(chosen, dim=1)


__all__ = ["accept_greedy", "accept_walk"]
