"""Scorers of other packages, found by the entry point group `pairmill.scorers`.

A scorer is a class (or an object) with `reads`, `writes` and a call on a batch of pairs; docs/scorers.md shows a whole
package. Its shards, resuming, workers and sidecar are the same as those of every other score.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import yaml

from curation.scores.columns import begin_scores, count_scored
from curation.scores.config import UserScoreConfig
from curation.scores.entry_points import find_scorer
from extractors.pipeline import map_ahead
from schemas.errors import PairmillError, suggest
from schemas.events import Emit, StageFinished, silent
from schemas.features import scores_schema
from schemas.pairs import RESERVED
from schemas.status import SUCCESS
from shards.dataset import PAIRS, Dataset, Stage
from shards.hand import RowInHand
from shards.images import ImageError, decode_rgb
from shards.parallel import run_stage, threads_per_worker
from shards.reader import row_groups
from shards.scan import metadata_schema
from shards.writer import write_table

IMAGE = "image"
TYPES: dict[str, pa.DataType] = {
    "float32": pa.float32(),
    "float64": pa.float64(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "bool": pa.bool_(),
    "string": pa.string(),
}
_CORES_PER_WORKER = 8
_BYTES_PER_ROW = 64


class Scorer(Protocol):
    """What a package offers. A class is called once in each worker, with the arguments of `--set` by name.

    reads   pair columns; `image` among them is the decoded image, uint8 [H, W, 3] sRGB
    writes  column -> its type: float32, float64, int32, int64, uint64, bool or string
    scale   column -> what its numbers mean, for the sidecar; may be left out
    """

    reads: Sequence[str]
    writes: Mapping[str, str]

    def __call__(self, pairs: Mapping[str, list[Any]]) -> Mapping[str, Sequence[Any]]:
        """A batch: `reads` by name, a list each, of N pairs that have all of it -> `writes` by name, N values each."""


@dataclass(frozen=True)
class UserScorer:
    """A scorer by its entry point. Picklable: a worker loads it by name."""

    name: str
    settings: tuple[str, ...]
    reads: tuple[str, ...]
    fields: tuple[pa.Field, ...]
    about: tuple[str, str, str]  # entry point, package, version
    scale: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.reads

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": self.about[0], "package": self.about[1], "package_version": self.about[2]}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return {f.name: {"what": f"{self.about[0]} of {self.about[1]}"} | self._scale(f.name) for f in self.fields}

    def _scale(self, column: str) -> dict[str, str]:
        return {"scale": str(self.scale[column])} if column in self.scale else {}

    @property
    def versions(self) -> dict[str, str]:
        return {self.about[1]: self.about[2]}

    def __call__(self, shard: int, pairs: pa.Table) -> Mapping[str, Any]:
        raise AssertionError("a user's scorer works on batches")


def describe(name: str, settings: Sequence[str] = ()) -> UserScorer:
    """What the scorer called `name` says of itself.

    Raises PairmillError: no such scorer, a package that cannot be loaded, `reads` or `writes` that are not as the
    protocol wants them, arguments that it does not take.
    """
    point = find_scorer(name)
    found = _load(point)
    where = f"scorer `{name}` ({point.value})"
    reads, writes = getattr(found, "reads", None), getattr(found, "writes", None)
    if isinstance(reads, str) or not isinstance(reads, Sequence) or not reads:
        raise PairmillError(f"{where}: `reads` must be a list of pair columns, found {reads!r}.")
    if not isinstance(writes, Mapping) or not writes:
        raise PairmillError(f"{where}: `writes` must map columns to types, found {writes!r}.")
    for column, kind in writes.items():
        if kind not in TYPES:
            raise PairmillError(f"{where}: `writes` gives `{column}` the type {kind!r}. There are: {', '.join(TYPES)}.")
        if column in RESERVED:
            raise PairmillError(f"{where}: `writes` has `{column}`, a column of pairs. Give it another name.")
    _bind(found, settings, where)
    package = point.dist.name if point.dist else ""
    version = point.dist.version if point.dist else ""
    fields = tuple(pa.field(column, TYPES[kind]) for column, kind in writes.items())
    scale = dict(getattr(found, "scale", {}))
    return UserScorer(name, tuple(settings), tuple(reads), fields, (point.value, package, version), scale)


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # a stranger's module may raise anything while it is imported
        text = f"{type(error).__name__}: {error}"
        raise PairmillError(f"scorer `{point.name}` ({point.value}) cannot be loaded: {text}.") from error


def _bind(found: Any, settings: Sequence[str], where: str) -> dict[str, Any]:
    """The arguments of `--set`. Raises PairmillError for those that the scorer does not take."""
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise PairmillError(f"`--set {setting}` must be KEY=VALUE.")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key] = value
    if not inspect.isclass(found):
        if values:
            raise PairmillError(f"{where} is no class: it takes no `--set`.")
        return values
    try:
        inspect.signature(found).bind(**values)
    except TypeError as error:
        raise PairmillError(f"{where}, arguments of --set: {error}.") from None
    return values


@lru_cache(maxsize=1)
def _made(name: str, settings: tuple[str, ...]) -> Scorer:
    """The scorer of this process, kept from shard to shard."""
    found = _load(find_scorer(name))
    made = found(**_bind(found, settings, name)) if inspect.isclass(found) else found
    if not callable(made):
        raise PairmillError(f"scorer `{name}` cannot be called: it needs `__call__(self, pairs)`.")
    return made


@dataclass(frozen=True)
class UserWork:
    """Makes the file of one shard. Picklable."""

    stage: Stage
    scorer: UserScorer
    batch_size: int
    threads: int

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        pairs = self.stage.dataset.stage(PAIRS)
        digest = pairs.digest(shard)
        rows = self.stage.dataset.manifest.shards[shard]
        made: dict[str, list[Any]] = {f.name: [None] * rows for f in self.scorer.fields}
        call = _made(self.scorer.name, self.scorer.settings)
        for numbers, batch in self._batches(pairs.file(shard), hand):
            values = self._checked(call(batch), len(numbers))
            for column, those in values.items():
                for number, value in zip(numbers, those, strict=True):
                    made[column][number] = value
            hand.progress(numbers[-1] + 1, 0)
        schema = scores_schema(self.scorer.fields)
        table = pa.table([self._array(made[f.name], f) for f in schema], schema=schema)
        counts = count_scored(table)
        write_table(self.stage.folder, self.stage.file(shard), table, counts, digest)
        return counts

    def _batches(self, file: str, hand: RowInHand) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Row numbers and columns of pairs that have everything that is read; none across shards."""
        with ThreadPoolExecutor(self.threads, "decode") as pool:

            def prepare(row: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
                return self._decoded(*row, hand)

            waiting: list[tuple[int, dict[str, Any]]] = []
            for number, row in map_ahead(pool, prepare, self._rows(file), 2 * self.batch_size):
                if all(value is not None for value in row.values()):
                    waiting.append((number, row))
                if len(waiting) == self.batch_size:
                    yield self._columns(waiting)
                    waiting = []
            if waiting:
                yield self._columns(waiting)

    def _rows(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        reads = self.scorer.reads
        for start, table in row_groups(self.stage.folder, file, [*dict.fromkeys([*reads, "status"])]):
            for at in range(len(table)):
                row = {name: table[name][at].as_py() for name in reads}
                if IMAGE in row and table["status"][at].as_py() != SUCCESS:
                    row[IMAGE] = None
                yield start + at, row

    def _decoded(self, number: int, row: dict[str, Any], hand: RowInHand) -> tuple[int, dict[str, Any]]:
        if row.get(IMAGE) is not None:
            if number in hand.crashed:
                return number, row | {IMAGE: None}
            try:
                with hand.hold(number):
                    row[IMAGE] = decode_rgb(row[IMAGE])
            except ImageError:
                row[IMAGE] = None
        return number, row

    def _columns(self, rows: list[tuple[int, dict[str, Any]]]) -> tuple[list[int], dict[str, list[Any]]]:
        return [n for n, _ in rows], {name: [row[name] for _, row in rows] for name in self.scorer.reads}

    def _checked(self, answer: Any, rows: int) -> dict[str, list[Any]]:
        """The answer's columns as lists. Raises PairmillError where it does not keep to `writes`."""
        where = f"scorer `{self.scorer.name}` ({self.scorer.about[0]})"
        want = [f.name for f in self.scorer.fields]
        if not isinstance(answer, Mapping) or sorted(answer) != sorted(want):
            got = ", ".join(map(str, answer)) if isinstance(answer, Mapping) else type(answer).__name__
            raise PairmillError(f"{where} must return the columns {', '.join(want)}, it returned {got or 'none'}.")
        out = {}
        for column, values in answer.items():
            found = values.tolist() if hasattr(values, "tolist") else list(values)
            if not isinstance(found, list) or len(found) != rows:
                count = len(found) if isinstance(found, list) else "no"
                raise PairmillError(
                    f"{where} returned {count} values of `{column}` for {rows} pairs. That shard is not written."
                )
            out[column] = found
        return out

    def _array(self, values: list[Any], field: pa.Field) -> pa.Array:
        try:
            return pa.array(values, field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            where = f"scorer `{self.scorer.name}` ({self.scorer.about[0]})"
            raise PairmillError(f"{where}: a value of `{field.name}` is no {field.type}: {error}.") from None


def score_user(
    dataset: Dataset | str | Path, scorer: str, config: UserScoreConfig | None = None, emit: Emit = silent
) -> StageFinished:
    """Writes `scores/NAME` with the columns of an installed scorer; a column of text is one more caption of each pair.

    A pair that lacks something the scorer reads (no image, no caption) is not given to it and has nulls. Raises
    PairmillError as `describe` does, and for columns that pairs do not have or answers that do not keep to `writes`.
    """
    config = config or UserScoreConfig()
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    found = describe(scorer, config.set_)
    have = [IMAGE, *metadata_schema(dataset.require(PAIRS)).names]
    for column in found.reads:
        if column not in have:
            raise PairmillError(
                f"scorer `{scorer}` reads `{column}`, which {dataset.url} does not have.{suggest(column, have)} "
                f"It has: {', '.join(have)}."
            )
    stage, pending = begin_scores(dataset, config.name or scorer, config, found, f"score {scorer}")
    workers = max(1, (os.cpu_count() or 1) // _CORES_PER_WORKER) if config.workers is None else config.workers
    work = UserWork(stage, found, config.batch_size, threads_per_worker(workers))
    try:
        return run_stage(
            stage,
            work,
            pending=pending,
            workers=workers,
            scheduler=config.scheduler,
            emit=emit,
            bytes_per_row=_BYTES_PER_ROW,
        )
    finally:
        _made.cache_clear()
