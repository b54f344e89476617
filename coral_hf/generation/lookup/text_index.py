"""Where a text has been before: earlier occurrences of its last tokens, and what followed them. Lists of ids, no tensors."""

from collections.abc import Iterable
from typing import NamedTuple


SHORTEST = 2  # tokens of a match: one alone recurs everywhere
LONGEST = 16  # of a match that is told apart from longer ones
PLACES = 16  # occurrences of the last tokens that are looked at, the latest first


class Match(NamedTuple):
    """What the text says next, if it repeats itself.

    Args:
        tokens (`list[int]`): the continuation.
        length (`int`): of the match that it follows, from [`SHORTEST`] to [`LONGEST`] tokens.
    """

    tokens: list[int]
    length: int


class TextIndex:
    """The ids of one text while it grows, and where each pair of them is.

    Args:
        ids (`Iterable[int]`): the prompt, without padding.
    """

    def __init__(self, ids: Iterable[int] = ()):
        self.ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # a pair -> the places of what followed it
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """More tokens at the end; each takes constant time."""
        for token in ids:
            if len(self.ids) >= SHORTEST:
                self._places.setdefault(tuple(self.ids[-SHORTEST:]), []).append(len(self.ids))
            self.ids.append(token)

    def match(self, count: int) -> Match | None:
        """The continuation, `count` tokens long, of the longest match with the end of the text, the latest of several.

        At most [`PLACES`] occurrences are compared over at most [`LONGEST`] tokens, however long the text is. A continuation
        that reaches the end of the text continues with itself: a loop is drafted as a loop.
        """
        ids, end = self.ids, len(self.ids)
        places = self._places.get(tuple(ids[-SHORTEST:])) if end >= SHORTEST else None
        if not places or count < 1:
            return None
        best, best_length = 0, 0
        for place in reversed(places[-PLACES:]):
            length = SHORTEST
            while length < min(LONGEST, place) and ids[place - 1 - length] == ids[end - 1 - length]:
                length += 1
            if length > best_length:
                best, best_length = place, length
            if length == LONGEST:
                break
        tokens = ids[best : best + count]
        while len(tokens) < count:
            tokens.append(tokens[len(tokens) - (end - best)])
        return Match(tokens, best_length)


__all__ = ["LONGEST", "PLACES", "SHORTEST", "Match", "TextIndex"]
