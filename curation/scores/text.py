"""Numbers of a caption: lengths, shares of character classes, repetition, and how often it occurs in the dataset."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from curation.scores.characters import DIGIT, KNOWN, SPACE, UPPER, Characters, Pieces, code_points
from curation.scores.columns import begin_scores, run_scores
from curation.scores.config import TextScoreConfig
from schemas.events import Emit, StageFinished, silent
from shards.dataset import PAIRS, Dataset
from shards.reader import read_table
from shards.scan import starts

NGRAM = 10  # characters, as data-juicer's character_repetition_filter takes by default
URL = r"(?i)(?:\bhttps?://|\bwww\.)\S"
_EXTENSION = r"\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|avif|heic|svg|psd|raw|cr2|nef|dng|mp4|mov|pdf)"
_CAMERA = (
    r"(?:img|imag|dsc[fn]?|dscn|pict?|pxl|mvi|vid|gopr|sam)[ _-]?|(?:image|photo|picture|screenshot|untitled)[_-]?|p"
)
# Up to five words that end as a picture's file does; or what cameras, phones and programs call files.
FILENAME = (
    rf"(?i)^\s*(?:\S+(?: \S+){{0,4}}{_EXTENSION}"
    rf"|(?:(?:{_CAMERA})\d{{3,}}|\d{{8}}[_-]\d{{6}})[\d_\-]*(?: ?\(\d+\))?)\s*$"
)
NUMBER = r"^\s*\p{Nd}"

_PARTS = 64  # the counting looks at one of so many parts of the hashes at a time


def _f(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind)


TEXT_FIELDS: tuple[pa.Field, ...] = (
    _f("characters", pa.uint32()),
    _f("words", pa.uint32()),
    _f("unique_words", pa.uint32()),
    _f("mean_word_length", pa.float32()),
    _f("digit_share", pa.float32()),
    _f("upper_share", pa.float32()),
    _f("symbol_share", pa.float32()),
    _f("ascii_share", pa.float32()),
    _f("repeated_ngram_share", pa.float32()),
    _f("has_url", pa.bool_()),
    _f("is_filename_like", pa.bool_()),
    _f("starts_with_number", pa.bool_()),
    _f("caption_count", pa.uint32()),
)
_SHARE = "0 to 1, of all characters; 0 for an empty caption"
PROVENANCE: dict[str, dict[str, Any]] = {
    "characters": {"what": "code points of the caption", "scale": "count"},
    "words": {"what": "runs without white space", "scale": "count"},
    "unique_words": {"what": "different words, lower case", "scale": "count"},
    "mean_word_length": {"what": "characters that are no white space, for each word", "scale": "characters"},
    "digit_share": {"what": "Unicode category Nd", "scale": _SHARE},
    "upper_share": {"what": "Unicode category Lu", "scale": _SHARE},
    "symbol_share": {"what": "neither letter, mark, digit nor white space", "scale": _SHARE},
    "ascii_share": {"what": "code points below 128", "scale": _SHARE},
    "repeated_ngram_share": {
        "what": f"runs of {NGRAM} characters that occur more than once, of all such runs, case ignored",
        "scale": "0 to 1; 0 for a caption shorter than that",
    },
    "has_url": {"what": "holds http://, https:// or www."},
    "is_filename_like": {"what": "the whole caption is a file's name, such as IMG_1234.jpg"},
    "starts_with_number": {"what": "its first character that is no white space is a digit"},
    "caption_count": {
        "what": "rows of the dataset with exactly this caption, of any status",
        "scale": "count; made again when the dataset changes",
    },
}


def text_statistics(captions: pa.ChunkedArray | pa.Array) -> dict[str, np.ndarray | pl.Series]:
    """Every column but caption_count, [rows], of string [rows]; a null caption counts as an empty one.

    docs/formats.md defines each.
    """
    characters = Characters.of(captions)
    codes = characters.codes
    classes, lower = code_points()
    of_code = classes[codes]
    spaces = (of_code & SPACE) != 0
    begins, ends = characters.words(spaces)
    lengths, blank = characters.lengths, characters.count(spaces)
    words = np.bincount(characters.text_of(begins), minlength=len(lengths))
    pieces = Pieces(characters, lower[codes])
    windows = characters.windows(NGRAM)
    runs = np.maximum(lengths - NGRAM + 1, 0)

    def share(of: np.ndarray, all_: np.ndarray = lengths) -> np.ndarray:
        return (of / np.maximum(all_, 1)).astype(np.float32)

    texts = pl.Series(captions).fill_null("")
    known = characters.count((of_code & KNOWN) != 0)
    return {
        "characters": lengths,
        "words": words,
        "unique_words": pieces.different(begins, ends),
        "mean_word_length": share(lengths - blank, words),
        "digit_share": share(characters.count((of_code & DIGIT) != 0)),
        "upper_share": share(characters.count((of_code & UPPER) != 0)),
        "symbol_share": share(lengths - blank - known),
        "ascii_share": share(characters.count(codes < 128)),
        "repeated_ngram_share": share(pieces.repeated(windows, windows + NGRAM), runs),
        "has_url": texts.str.contains(URL),
        "is_filename_like": texts.str.contains(FILENAME),
        "starts_with_number": texts.str.contains(NUMBER),
    }


@dataclass(frozen=True)
class CaptionCounts:
    """How often each row's caption occurs: uint32 [rows of the dataset] in a file that the workers map.

    starts  int64 [shards + 1], the first row of each shard
    """

    path: str
    starts: np.ndarray

    def of_shard(self, shard: int) -> np.ndarray:
        """uint32 [rows]."""
        counts = np.load(self.path, mmap_mode="r")
        return counts[self.starts[shard] : self.starts[shard + 1]]


def count_captions(dataset: Dataset) -> np.ndarray:
    """How many rows of the dataset, of any status, have exactly this row's caption: uint32 [rows]; 0 where it is null.

    Captions are compared by two 64-bit hashes (of two seeds): 16 bytes a row, and 4 of the result. Raises
    PairmillError where a shard of pairs is missing.
    """
    pairs = dataset.require(PAIRS)
    first = starts(dataset)
    hashes: np.ndarray = np.zeros((2, first[-1]), np.uint64)
    parts: np.ndarray = np.full(first[-1], _PARTS, np.uint8)
    for shard in range(dataset.num_shards):
        captions = pl.Series(read_table(dataset.folder, pairs.file(shard), ["caption"])["caption"])
        rows = slice(first[shard], first[shard + 1])
        for seed in range(2):
            hashes[seed, rows] = captions.hash(seed).to_numpy()
        present = captions.is_not_null().to_numpy()
        parts[rows][present] = hashes[0, rows][present] % _PARTS
    counts: np.ndarray = np.zeros(first[-1], np.uint32)
    for part in range(_PARTS):
        at = np.flatnonzero(parts == part)
        frame = pl.DataFrame({"first": hashes[0, at], "second": hashes[1, at]})
        counts[at] = frame.select(pl.len().over("first", "second")).to_series().to_numpy()
    return counts


@dataclass(frozen=True)
class TextScorer:
    """The columns of `scores/text`; null where the caption is null."""

    counts: CaptionCounts | None = None
    columns: tuple[str, ...] = ("caption",)
    fields: tuple[pa.Field, ...] = TEXT_FIELDS

    @property
    def identity(self) -> dict[str, Any]:
        return {"ngram": NGRAM, "rules": 1}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return PROVENANCE

    @property
    def versions(self) -> dict[str, str]:
        return {"polars": pl.__version__, "unicode": unicodedata.unidata_version}

    def __call__(self, shard: int, pairs: pa.Table) -> Mapping[str, pa.Array]:
        captions = pairs["caption"].combine_chunks()
        made: dict[str, Any] = dict(text_statistics(captions))
        if self.counts is None:
            raise AssertionError("counted before shards are scored")
        made["caption_count"] = self.counts.of_shard(shard)
        null = np.asarray(pc.is_null(captions))
        kinds = {field.name: field.type for field in self.fields}
        return {name: pa.array(np.asarray(value), mask=null).cast(kinds[name]) for name, value in made.items()}


def score_text(dataset: Dataset | str | Path, config: TextScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: numbers of every caption, whatever its row's status; null where there is none.

    caption_count is exact for the dataset as it stands. Any change of its pairs (growth, retry, removal) makes every
    shard count as not done, and the next run counts anew. Raises PairmillError as `run_stage` does.
    """
    stage, pending = begin_scores(dataset, config.name, config, TextScorer(), "score text")
    if not pending:
        return run_scores(stage, pending, TextScorer(), emit, whole=True)
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        path = f"{folder}/counts.npy"
        np.save(path, count_captions(stage.dataset))
        scorer = TextScorer(CaptionCounts(path, starts(stage.dataset)))
        return run_scores(stage, pending, scorer, emit, workers=config.workers, whole=True)
