"""What draft heads cost, in rows of the full head: the unit of `compare_heads.py` and `benchmark_head.py`.

A row is H multiplications per drafted row, and H weights that are read.
"""

import torch


def router_rows(router: torch.nn.Module, hidden_size: int) -> float:
    """Of a router's MLP alone, without the groups that it chooses."""
    return (router.up_proj.weight.numel() + router.down_proj.weight.numel()) / hidden_size


def groups_within(rows: float, router: torch.nn.Module, hidden_size: int) -> int:
    """Groups that cost that many rows together with the router's MLP; at least one."""
    left = rows - router_rows(router, hidden_size)
    return max(1, min(router.num_groups, round(left / router.group_size)))


def low_rank_rows(rank: int, candidates: int, vocab_size: int, hidden_size: int) -> float:
    """Of a low-rank head: both of its matrices, and the exact rows of its candidates."""
    return rank * (vocab_size + hidden_size) / hidden_size + candidates


def rank_within(rows: float, candidates: int, vocab_size: int, hidden_size: int) -> int:
    """The rank at which a low-rank head costs that many rows; at least one."""
    rank = round((rows - candidates) * hidden_size / (vocab_size + hidden_size))
    return max(1, min(hidden_size, rank))
