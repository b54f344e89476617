"""An index of a text: earlier occurrences of its last tokens, and what followed them. Lists of ids, no tensors."""

from collections.abc import Iterable
from typing import NamedTuple


SHORTEST = 2  # shortest match in tokens; single tokens recur too often
LONGEST = 16  # longest match in tokens; longer ones count as this long
PLACES = 16  # most occurrences that are compared, latest first


class Match(NamedTuple):
    """The continuation of the text if it repeats itself.

    Args:
        tokens (`list[int]`): the continuation.
        length (`int`): length of the match before it, from [`SHORTEST`] to [`LONGEST`] tokens.
    """

    tokens: list[int]
    length: int


class TextIndex:
    """The ids of one growing text, with the positions of each pair of ids.

    Args:
        ids (`Iterable[int]`): the prompt, without padding.
    """

    def __init__(self, ids: Iterable[int] = ()):
        self.ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # a pair -> the positions after it
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Appends tokens, in constant time for each."""
        for token in ids:
            if len(self.ids) >= SHORTEST:
                self._places.setdefault(tuple(self.ids[-SHORTEST:]), []).append(len(self.ids))
            self.ids.append(token)

    def match(self, count: int) -> Match | None:
        """The continuation, `count` tokens long, of the longest earlier match with the end of the text, or the latest of several.

        At most [`PLACES`] occurrences are compared over at most [`LONGEST`] tokens, so that the time does not depend on the
        length of the text. A continuation that reaches the end of the text continues with itself, so that loops are drafted.
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
