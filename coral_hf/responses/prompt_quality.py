"""Checks sampled texts: whether they are valid prompts, repeat earlier ones, and their probable language."""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable

import torch


SHORTEST = 8  # characters
_ALIKE = 0.7  # texts with at least this share of common shingles are duplicates
_BANDS, _ROWS = 8, 4  # of the MinHash: texts that share less than half of their shingles rarely match in a band
_PRIME = (1 << 31) - 1
_WORDS = {
    "English": "the of and to is what how a in you for that can with",
    "German": "der die das und ist wie ein nicht mit zu ich was für auf",
    "French": "le la les et est une que des pour dans quel vous du",
    "Spanish": "el la los de que y es en un por para cómo qué una",
    "Italian": "il che di è la per un non sono come con della",
    "Portuguese": "o que de é um para como não uma os em do da",
}


def flaw_of(text: str, special_tokens: Iterable[str] = ()) -> str | None:
    """Why a text is not a valid prompt: `"empty"` or `"degenerate"`; None if it is valid."""
    if len(text) < SHORTEST or not any(character.isalpha() for character in text):
        return "empty"
    strange = any(
        unicodedata.category(character) in ("Cc", "Co", "Cn") and character not in "\n\t\r" for character in text
    )
    if strange or "\ufffd" in text or any(token and token in text for token in special_tokens):
        return "degenerate"
    pieces = text.split() if len(text.split()) > len(text) // 20 else list(text)
    runs = [tuple(pieces[place : place + 3]) for place in range(len(pieces) - 2)]
    repeated = len(runs) >= 12 and len(set(runs)) < 0.6 * len(runs)
    (_, most), *_ = Counter(character for character in text if not character.isspace()).most_common(1)
    return "degenerate" if repeated or (len(text) > 20 and most > 0.4 * len(text)) else None


class NearDuplicates:
    """A collection of texts that finds near-duplicates by common shingles (five normalised characters), using MinHash."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._factors = torch.randint(1, _PRIME, (_BANDS * _ROWS, 1), generator=generator)
        self._terms = torch.randint(0, _PRIME, (_BANDS * _ROWS, 1), generator=generator)
        self._buckets: dict[tuple[int, ...], list[int]] = {}
        self._shingles: list[set[int]] = []

    def add(self, text: str) -> None:
        """Adds a text."""
        shingles = _shingles(text)
        for band in self._bands(shingles):
            self._buckets.setdefault(band, []).append(len(self._shingles))
        self._shingles.append(shingles)

    def __contains__(self, text: str) -> bool:
        shingles = _shingles(text)
        places = {place for band in self._bands(shingles) for place in self._buckets.get(band, ())}
        return any(
            len(shingles & self._shingles[place]) >= _ALIKE * len(shingles | self._shingles[place]) for place in places
        )

    def _bands(self, shingles: set[int]) -> list[tuple[int, ...]]:
        values = torch.tensor(sorted(shingles), dtype=torch.int64)[None]  # [1, n], below 2^31
        least = ((self._factors * values + self._terms) % _PRIME).min(dim=1).values.tolist()
        return [(band, *least[band * _ROWS : (band + 1) * _ROWS]) for band in range(_BANDS)]


def _shingles(text: str) -> set[int]:
    text = " ".join(re.findall(r"\w+", text.casefold())) or text
    pieces = [text[place : place + 5] for place in range(max(1, len(text) - 4))]
    return {zlib.crc32(piece.encode(errors="surrogatepass")) % _PRIME for piece in pieces}


def language_of(text: str) -> str:
    """The probable language of a text, by its most common words; otherwise its script."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return "none"
    (script, _), *_ = Counter(unicodedata.name(letter, "OTHER").split()[0] for letter in letters).most_common(1)
    if script != "LATIN":
        return script.capitalize()
    words = re.findall(r"\w+", text.casefold())
    scores = {name: sum(word in common.split() for word in words) for name, common in _WORDS.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] else "Latin script"


__all__ = ["NearDuplicates", "flaw_of", "language_of"]
