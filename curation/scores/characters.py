"""Captions as one array of code points, and numbers of each caption counted over it without a loop."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPACE, DIGIT, UPPER, KNOWN = 1, 2, 4, 8
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


@lru_cache(maxsize=1)
def code_points() -> tuple[np.ndarray, np.ndarray]:
    """Of every code point: its classes, uint8, and its lower case, uint32 (itself where that is no single one).

    SPACE as `str.split` cuts, DIGIT category Nd, UPPER category Lu, KNOWN a letter, mark or number.
    """
    classes: np.ndarray = np.zeros(sys.maxunicode + 1, np.uint8)
    lower: np.ndarray = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for code in range(sys.maxunicode + 1):
        one = chr(code)
        category = unicodedata.category(one)
        if category in ("Cn", "Co", "Cs"):
            continue
        if category[0] in "LMN":
            classes[code] = KNOWN | (DIGIT if category == "Nd" else UPPER if category == "Lu" else 0)
            small = one.lower()
            if len(small) == 1:
                lower[code] = ord(small)
        elif one.isspace():
            classes[code] = SPACE
    return classes, lower


@dataclass(frozen=True)
class Characters:
    """Code points of many texts, one behind the other: text i lies at starts[i] to starts[i + 1].

    codes   uint32 [characters]
    starts  int64 [texts + 1]
    """

    codes: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: pa.ChunkedArray | pa.Array) -> Characters:
        """A null text has no characters."""
        filled = pc.fill_null(texts, "")
        lengths = pc.utf8_length(filled).to_numpy()
        whole = "".join(filled.to_pylist())
        codes = np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), np.uint32)
        return cls(codes, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [texts]."""
        return np.diff(self.starts)

    def count(self, which: np.ndarray) -> np.ndarray:
        """How many of each text's characters are marked: bool [characters] -> int64 [texts]."""
        sums = np.concatenate([[0], np.cumsum(which, dtype=np.int64)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def words(self, spaces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where runs of characters that are no spaces begin and end: two int64 [words], none across texts."""
        gap: np.ndarray = np.ones(len(spaces) + 2, bool)
        gap[1:-1] = spaces
        first: np.ndarray = np.zeros(len(spaces) + 1, bool)
        first[self.starts] = True  # a text begins here, or all have ended
        begins = ~gap[1:-1] & (gap[:-2] | first[:-1])
        ends = ~gap[1:-1] & (gap[2:] | first[1:])
        return np.flatnonzero(begins), np.flatnonzero(ends) + 1

    def windows(self, size: int) -> np.ndarray:
        """Where runs of `size` characters of one text begin: int64 [runs]."""
        fits: np.ndarray = np.ones(len(self.codes), bool)
        cut = self.starts[1:, None] - np.arange(1, size)
        cut = cut[cut >= self.starts[:-1, None]]
        fits[cut] = False
        return np.flatnonzero(fits)

    def text_of(self, positions: np.ndarray) -> np.ndarray:
        """The number of the text that each position lies in: int64."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)[positions]


class Pieces:
    """Pieces of texts compared within each text, by a hash of at least 40 bits."""

    def __init__(self, characters: Characters, codes: np.ndarray) -> None:
        """`codes`, uint32 [characters]: what the pieces are compared by."""
        self.characters = characters
        self.texts = len(characters.lengths)
        powers = np.cumprod(np.concatenate([[np.uint64(1)], np.full(len(codes), _BASE)]), dtype=np.uint64)
        self.back = np.cumprod(np.concatenate([[np.uint64(1)], np.full(len(codes), _INVERSE)]), dtype=np.uint64)
        terms = (codes.astype(np.uint64) + np.uint64(1)) * powers[: len(codes)]
        self.sums = np.concatenate([[np.uint64(0)], np.cumsum(terms, dtype=np.uint64)])

    def _sorted(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the pieces (text number above, hash below), sorted, and each one's text."""
        bits = np.uint64(max(1, int(self.texts).bit_length()))
        value = (self.sums[ends] - self.sums[begins]) * self.back[begins]  # sum of codes x BASE**place, mod 2**64
        value ^= value >> np.uint64(31)
        value *= np.uint64(0xBF58476D1CE4E5B9)
        text: np.ndarray = self.characters.text_of(begins).astype(np.uint64)
        keys = np.sort((text << (np.uint64(64) - bits)) | (value >> bits))
        return keys, (keys >> (np.uint64(64) - bits)).astype(np.int64)

    def different(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How many different pieces each text has: int64 [texts]."""
        keys, text = self._sorted(begins, ends)
        first: np.ndarray = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        return np.bincount(text[first], minlength=self.texts)

    def repeated(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How many of each text's pieces occur in it more than once: int64 [texts]."""
        keys, text = self._sorted(begins, ends)
        same: np.ndarray = np.zeros(len(keys) + 1, bool)
        same[1:-1] = keys[1:] == keys[:-1]
        return np.bincount(text[same[1:] | same[:-1]], minlength=self.texts)
