"""Is this whole file a fastText classifier? Asked before fastText's own C++ loader opens it.

That loader trusts every length it reads: a download that was cut short makes it run for ever or take all memory.
Layout as written by fastText 0.9 (`FastText::saveModel`), little-endian throughout.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from schemas.errors import PairmillError

MAGIC, NEWEST = 793712314, 12
SUPERVISED = 3
KSUB = 256  # centroids of a product quantiser
_WORD, _LABEL = 0, 1
_MOST_NGRAM = 1000


class _BadFileError(Exception):
    """What is wrong with the file."""


def check_classifier(path: Path) -> None:
    """Walks over every part of the file and compares the lengths it tells with what is there.

    Raises PairmillError: no such file; no fastText model; a model of words without labels; cut short or damaged.
    """
    if not path.is_file():
        raise PairmillError(f"`--weights {path}`: no such file. Fetch lid.176.bin or lid.176.ftz of fastText.")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).whole()
    except (_BadFileError, struct.error, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise PairmillError(
            f"`--weights {path}`: not a whole fastText language model ({error}). "
            "Expected is a file such as lid.176.bin or lid.176.ftz; fetch it again."
        ) from None


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def whole(self) -> None:
        magic, version = self.read("<ii")
        if magic != MAGIC:
            raise _BadFileError("it does not begin as one does")
        if not 11 <= version <= NEWEST:
            raise _BadFileError(f"version {version}; 11 and {NEWEST} are read")
        dim, _, _, _, _, ngrams, _, model, bucket, minn, maxn, _, _ = self.read("<12id")
        if model != SUPERVISED:
            raise _BadFileError("it holds word vectors, no classifier")
        sane = dim > 0 and 0 <= ngrams <= _MOST_NGRAM and 0 <= minn <= _MOST_NGRAM and 0 <= maxn <= _MOST_NGRAM
        if not sane or bucket < 0:
            raise _BadFileError("its settings make no sense")
        words, labels, hashed = self.dictionary(bucket)
        quantised = self.flag()
        self.matrix(words + hashed, dim, quantised)
        output = self.flag()
        self.matrix(labels, dim, quantised and output)
        if self.at != len(self.data):
            raise _BadFileError(f"{len(self.data) - self.at:,} bytes too many")

    def read(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def flag(self) -> bool:
        (value,) = self.read("<B")
        if value > 1:
            raise _BadFileError("a flag that is none")
        return bool(value)

    def skip(self, size: int) -> None:
        if size < 0 or self.at + size > len(self.data):
            raise _BadFileError("it is cut short")
        self.at += size

    def dictionary(self, bucket: int) -> tuple[int, int, int]:
        """(words, labels, rows of the input matrix for hashed n-grams)."""
        size, words, labels, _, pruned = self.read("<iiiqq")
        if words < 0 or labels < 1 or size != words + labels:
            raise _BadFileError("its dictionary does not add up")
        for entry in range(size):
            end = self.data.find(b"\0", self.at)
            if end < 0:
                raise _BadFileError("it is cut short")
            self.at = end + 1
            _, kind = self.read("<qb")
            if kind != (_WORD if entry < words else _LABEL):
                raise _BadFileError("words and labels are mixed")
        if pruned <= 0:
            return words, labels, bucket if pruned < 0 else 0
        places = len(self.data) - self.at
        if pruned * 8 > places:
            raise _BadFileError("it is cut short")
        for _ in range(pruned):
            _, row = self.read("<ii")
            if not 0 <= row < pruned:
                raise _BadFileError("an n-gram leads outside of its matrix")
        return words, labels, pruned

    def matrix(self, rows: int, dim: int, quantised: bool) -> None:
        if not quantised:
            if self.read("<qq") != (rows, dim):
                raise _BadFileError("a matrix of another size than its dictionary")
            self.skip(rows * dim * 4)
            return
        norms = self.flag()
        m, n, codes = self.read("<qqi")
        if (m, n) != (rows, dim):
            raise _BadFileError("a matrix of another size than its dictionary")
        self.skip(codes)
        parts = self.quantiser(dim)
        if codes != rows * parts:
            raise _BadFileError("codes of another number than the matrix has rows")
        if norms:
            self.skip(rows)
            self.quantiser(1)

    def quantiser(self, dim: int) -> int:
        """Number of parts that a row is cut into."""
        told, parts, width, last = self.read("<iiii")
        if told != dim or parts < 1 or width < 1 or last < 1 or (parts - 1) * width + last != dim or last > width:
            raise _BadFileError("a quantiser that does not fit its matrix")
        self.skip(dim * KSUB * 4)
        return parts
