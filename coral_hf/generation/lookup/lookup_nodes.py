"""LookupNodes: what each row's text says next, with chances of acceptance that follow from how often it was right."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from ..tree_size import DraftCosts
from .text_index import LONGEST, SHORTEST, Match, TextIndex


# How often the token after a match of 2, 3, ... 16 tokens was the target's, made monotone: 166,000 matches in greedy answers of
# SmolLM2-135M-Instruct to 2,000 training prompts (`benchmarks/fit_lookup.py`, `benchmarks/records/lookup/prior.json`).
PRIOR = (0.55, 0.63, 0.68, 0.71, 0.76, 0.78, 0.81, 0.82, 0.84, 0.84, 0.87, 0.88, 0.88, 0.88, 0.97)
PRIOR_WEIGHT = 4.0  # tokens of a row's own that count as much as it
LEAST_CHANCE = 0.05  # of a node that is worth its place in a tree
FEWEST_DRAFTS = 4  # before what they bring is known well enough to leave one out


class LookupRecord:
    """How often matches of each length were right in one text."""

    def __init__(self) -> None:
        self._right = [PRIOR_WEIGHT * rate for rate in PRIOR]
        self._seen = [PRIOR_WEIGHT] * len(PRIOR)

    def rate(self, length: int) -> float:
        """The chance that the token after a match of `length` tokens is the target's."""
        place = min(length, LONGEST) - SHORTEST
        return self._right[place] / self._seen[place]

    def chances(self, match: Match) -> list[float]:
        """The chance of acceptance of each token of a continuation: a match grows with every token that is right."""
        chances, chance = [], 1.0
        for step in range(len(match.tokens)):
            chance *= self.rate(match.length + step)
            chances.append(chance)
        return chances

    def settle(self, match: Match, tokens: list[int]) -> None:
        """Takes account of the target's own `tokens` where a continuation was expected, whether it was drafted or not."""
        for step, (expected, token) in enumerate(zip(match.tokens, tokens, strict=False)):
            place = min(match.length + step, LONGEST) - SHORTEST
            self._seen[place] += 1
            self._right[place] += expected == token
            if expected != token:
                break


@dataclass
class Found:
    """Continuations of a batch's rows, as nodes that follow each other from the root.

    Args:
        tokens (`list[list[int]]`): of each row, all of one length, filled up with 0.
        chances (`list[list[float]]`): of acceptance, as many; 0 where nothing was found.
        alone (`bool`): they are to be verified without a draft beside them.
    """

    tokens: list[list[int]]
    chances: list[list[float]]
    alone: bool = False

    def mean_chances(self) -> list[float]:
        """Of each depth, over the rows."""
        return [sum(column) / len(column) for column in zip(*self.chances, strict=True)]

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and chances, both `[B, L]`, which reach the device in one piece."""
        # float32 is exact for ids below 2^24, and every device has it
        tokens, chances = torch.tensor([self.tokens, self.chances], dtype=torch.float32).to(device)
        return tokens.long(), chances


class LookupNodes:
    """Continuations for the live rows of a call of `generate`.

    Args:
        prompts (`list[list[int]]`): the ids of each row, without padding.
        most (`int`): nodes of a row at the same time, the root left out.
    """

    def __init__(self, prompts: list[list[int]], most: int):
        self._most = most
        self._rows = [(TextIndex(prompt), LookupRecord()) for prompt in prompts]
        self._matches: list[Match | None] = [None] * len(prompts)
        # of the steps that drafted: how many, tokens accepted in each row, and milliseconds
        self._drafts, self._accepted, self._drafts_ms = 0, 0.0, 0.0

    def find(self, deepest: int, costs: DraftCosts | None = None, drafts: bool = True) -> Found | None:
        """Continuations of the live rows' texts; None if no row has one that is worth a node.

        They are to be verified alone if they promise more tokens per millisecond than the call's drafts gave, or than a
        plain step gives where none is drafted; without costs, if they promise as many tokens as the drafts gave.

        Args:
            deepest (`int`): no row has room for more.
            costs ([`DraftCosts`], *optional*): of the step.
            drafts (`bool`): the step drafts unless they are verified alone.
        """
        self._matches = [index.match(min(deepest, self._most)) for index, _ in self._rows]
        tokens, chances = [], []
        for match, (_, record) in zip(self._matches, self._rows, strict=True):
            worth = [] if match is None else [c for c in record.chances(match) if c >= LEAST_CHANCE]
            chances.append(worth)
            tokens.append([] if match is None else match.tokens[: len(worth)])
        longest = max(map(len, tokens))
        if not longest:
            return None
        for row_tokens, row_chances in zip(tokens, chances, strict=True):
            missing = longest - len(row_tokens)
            row_tokens += [0] * missing
            row_chances += [0.0] * missing
        found = Found(tokens, chances)
        count = self._alone(found.mean_chances(), costs, drafts)
        return Found([row[:count] for row in tokens], [row[:count] for row in chances], True) if count else found

    def _alone(self, chances: list[float], costs: DraftCosts | None, drafts: bool) -> int:
        """How many of the nodes to verify without a draft; 0: draft."""
        known = self._drafts >= FEWEST_DRAFTS
        if costs is None:
            return len(chances) if known and sum(chances) * self._drafts >= self._accepted else 0
        expected = list(accumulate(chances, initial=1.0))
        speeds = [tokens / time for tokens, time in zip(expected, costs.target_ms, strict=False)]
        count = max(range(len(speeds)), key=speeds.__getitem__)
        if not drafts:
            return count
        if not known:
            return 0
        return count if speeds[count] * self._drafts_ms > self._accepted + self._drafts else 0

    def extend(self, tokens: list[list[int]]) -> None:
        """Adds the tokens that the live rows got since [`find`], and takes account of what it had found."""
        for (index, record), match, new in zip(self._rows, self._matches, tokens, strict=True):
            if match is not None:
                record.settle(match, new)
            index.extend(new)
        self._matches = [None] * len(self._rows)

    def drafted(self, counts: list[int], step_ms: float = 0.0) -> None:
        """Takes account of a step that drafted, its tokens of each row and what it took by the costs."""
        self._drafts += 1
        self._accepted += sum(counts) / len(counts) - 1
        self._drafts_ms += step_ms

    def keep_rows(self, order: list[int]) -> None:
        """Continues with these live rows, in this order."""
        self._rows = [self._rows[row] for row in order]
        self._matches = [self._matches[row] for row in order]


__all__ = ["Found", "LookupNodes", "LookupRecord"]
