"""LookupNodes: continuations found in each row's text, with chances of acceptance learned from earlier matches."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from ..tree_size import DraftCosts
from .text_index import LONGEST, SHORTEST, Match, TextIndex


# How often the token after a match of 2, 3, ... 16 tokens was the target's, made monotone: 166,000 matches in greedy answers of
# SmolLM2-135M-Instruct to 2,000 training prompts (`benchmarks/fit_lookup.py`, `benchmarks/records/lookup/prior.json`).
PRIOR = (0.55, 0.63, 0.68, 0.71, 0.76, 0.78, 0.81, 0.82, 0.84, 0.84, 0.87, 0.88, 0.88, 0.88, 0.97)
PRIOR_WEIGHT = 4.0  # weight of the prior, in tokens of the row itself
LEAST_CHANCE = 0.05  # least chance of a node that is worth verifying
FEWEST_DRAFTS = 4  # drafts needed before their gain is known well enough to skip one


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
        """Compares an expected continuation with the target's own `tokens`, whether it was drafted or not."""
        for step, (expected, token) in enumerate(zip(match.tokens, tokens, strict=False)):
            place = min(match.length + step, LONGEST) - SHORTEST
            self._seen[place] += 1
            self._right[place] += expected == token
            if expected != token:
                break


@dataclass
class Found:
    """Continuations of a batch's rows, as a path of nodes from the root.

    Args:
        tokens (`list[list[int]]`): tokens of each row, padded with 0 to one length.
        chances (`list[list[float]]`): chances of acceptance in the same shape; 0 where nothing was found.
        alone (`bool`): verify them without a draft.
    """

    tokens: list[list[int]]
    chances: list[list[float]]
    alone: bool = False

    def mean_chances(self) -> list[float]:
        """The chance at each depth, over the rows."""
        return [sum(column) / len(column) for column in zip(*self.chances, strict=True)]

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and chances, both `[B, L]`, moved to the device in one transfer."""
        # float32 is exact for ids below 2^24, and every device has it
        tokens, chances = torch.tensor([self.tokens, self.chances], dtype=torch.float32).to(device)
        return tokens.long(), chances


class LookupNodes:
    """Continuations for the live rows of a call of `generate`.

    Args:
        prompts (`list[list[int]]`): the ids of each row, without padding.
        most (`int`): most nodes of a row per step, without the root.
    """

    def __init__(self, prompts: list[list[int]], most: int):
        self._most = most
        self._rows = [(TextIndex(prompt), LookupRecord()) for prompt in prompts]
        self._matches: list[Match | None] = [None] * len(prompts)
        # over the steps that drafted: their number, tokens accepted per row, and milliseconds
        self._drafts, self._accepted, self._drafts_ms = 0, 0.0, 0.0

    def find(self, deepest: int, costs: DraftCosts | None = None, drafts: bool = True) -> Found | None:
        """Continuations of the live rows' texts; None if no row has one that is worth a node.

        They are verified alone if they promise more tokens per millisecond than the drafts of this call, or than a plain step
        if the step does not draft. Without costs, they are verified alone if they promise as many tokens as the drafts.

        Args:
            deepest (`int`): the most nodes that any row has room for.
            costs ([`DraftCosts`], *optional*): costs of the step.
            drafts (`bool`): whether the step drafts if they are not verified alone.
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
        """The number of nodes to verify without a draft; 0: draft."""
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
        """Adds the tokens that the live rows got since [`find`], and compares them with its continuations."""
        for (index, record), match, new in zip(self._rows, self._matches, tokens, strict=True):
            if match is not None:
                record.settle(match, new)
            index.extend(new)
        self._matches = [None] * len(self._rows)

    def drafted(self, counts: list[int], step_ms: float = 0.0) -> None:
        """Records a step that drafted: its tokens per row, and its time according to the costs."""
        self._drafts += 1
        self._accepted += sum(counts) / len(counts) - 1
        self._drafts_ms += step_ms

    def keep_rows(self, order: list[int]) -> None:
        """Keeps these live rows, in this order."""
        self._rows = [self._rows[row] for row in order]
        self._matches = [self._matches[row] for row in order]


__all__ = ["Found", "LookupNodes", "LookupRecord"]
