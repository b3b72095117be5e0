"""`import-features`: features that somebody already has become a feature set of a dataset.

The file's keys are read once and joined with the rows; then each output shard looks its entries up in the file, so
memory holds an index and a batch, and a killed import goes on with the shards that are missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from extractors.imports.config import FORMATS, ImportFeaturesConfig
from extractors.imports.databases import LmdbSource, database_path
from extractors.imports.folders import FolderSource
from extractors.imports.keys import KEY, NOTHING, RULES, Entries, Hashes, Join, join, row_keys
from extractors.imports.record import VISUAL_GENOME, Classes, Layout, Record, RowError, Sizes, learn, row_of
from extractors.imports.tsv import Read, TsvSource
from extractors.resume import marks_metadata, row_marks
from schemas.config import fingerprint
from schemas.errors import PairmillError, suggest
from schemas.events import Emit, Notice, StageFinished, silent
from schemas.features import FEATURES, VERSION, features_schema, region_fields
from schemas.pairs import PAIRS, given_uid, pairs_digest, pairs_schema
from schemas.pairs import VERSION as PAIRS_VERSION
from schemas.sidecars import make_sidecar
from schemas.status import NO_IMAGE, OK, SUCCESS
from shards.dataset import MANIFEST, Dataset, new_manifest, read_manifest, write_manifest
from shards.files import open_folder
from shards.hand import RowInHand
from shards.locks import lock
from shards.parallel import run_stage
from shards.reader import read_table
from shards.writer import write_features, write_pairs

COMMAND = "import-features"
LEAST_SHARE = 0.99
_MEND = "Pass the old settings, or --name to start beside it."
_LOOKED_AT, _MOST_LOOKED_AT = 16, 256  # entries the layout is learnt from; entries tried for it
_SHOWN = 5
_SIZES = ("width", "height", "original_width", "original_height")


class Source(Protocol):
    """A file of features, or a folder or database of them. Picklable."""

    def scan(self, entries: Entries, warn: Callable[[str], None]) -> dict[str, Any]:
        """Adds every entry, and returns what tells this file from any other."""

    def open(self) -> AbstractContextManager[Read]:
        """A function (key, place) -> Record. It raises RowError for an entry that cannot be read."""


def open_source(format: str, path: str, config: ImportFeaturesConfig) -> Source:
    """Raises PairmillError: an unknown format, or nothing of it at `path`."""
    if format not in FORMATS:
        raise PairmillError(
            f"There is no format `{format}`.{suggest(format, FORMATS)} There are: {', '.join(FORMATS)}."
        )
    if format != "tsv" and (config.fields is not None or config.dtype != "float32"):
        raise PairmillError(f"`--fields` and `--dtype` are for tsv; {format} has names and types of its own.")
    if config.new and config.key is not None:
        raise PairmillError("`--new` names rows by the file's own keys. Leave out --key, or --new.")
    if format == "tsv":
        return TsvSource.of(path, config.fields, config.dtype)
    if not Path(path).exists():
        raise PairmillError(f"{path}: no such file or folder.")
    if format == "uniter-lmdb":
        return LmdbSource(database_path(path), "uniter", config.allow_missing)
    if format == "mmf-lmdb":
        return LmdbSource(database_path(path), "mmf", config.allow_missing)
    return FolderSource(Path(path), "npy" if format == "npy" else "npz")


def import_features(
    format: str, path: str, dataset: str | Path, config: ImportFeaturesConfig, emit: Emit = silent
) -> StageFinished:
    """Writes `features/NAME` of what lies at `path`, and with `config.new` the dataset, too.

    A row whose image has no entry is `missing_file`; one whose entry cannot be read has its state, and why in `error`.
    Raises PairmillError: nothing readable at `path`, under 99 % of the rows matched, another file than the one that the
    set was begun with, no lmdb package.
    """
    source = open_source(format, path, config)
    entries = Entries()
    origin = source.scan(entries, lambda text: emit(Notice(text, True)))
    if not len(entries):
        raise PairmillError(f"{path} holds no entry. Nothing written.")
    layout = _learnt(source, entries, path, config)
    classes = Classes(*_names(config.classes, layout.classes or VISUAL_GENOME[0]))
    attributes, _ = _names(config.attributes, VISUAL_GENOME[1])
    made = Made(source, layout, classes, attributes, f"{FEATURES}/{config.name}", config.new)
    extra = {"format": format, "file": origin, **made.identity()}
    with tempfile.TemporaryDirectory(prefix="pairmill-import-") as folder:
        joined = str(Path(folder) / "joined.arrow")
        if config.new:
            return _into_new(dataset, entries, made, joined, config, extra, emit)
        target = Dataset.open(dataset)
        target.require(PAIRS)
        standing = target.stage(made.path).sidecar()
        rules = (standing.recorded["joined_by"],) if standing and "joined_by" in standing.recorded else RULES
        found = _join(target, entries, path, rules, config, emit)
        _write_joined(joined, target.manifest.shards, found.entry, entries)
        return _run(target, made, joined, config, extra, found.rule, emit)


def _learnt(source: Source, entries: Entries, path: str, config: ImportFeaturesConfig) -> Layout:
    """Raises PairmillError where none of the first entries can be read."""
    records: list[Record] = []
    first_fault = ""
    with source.open() as read:
        for key, place in islice(entries, _MOST_LOOKED_AT):
            try:
                records.append(read(key, place))
            except RowError as error:
                first_fault = first_fault or f"{key}: {error}"
            if len(records) == _LOOKED_AT:
                break
    if not records:
        raise PairmillError(f"{path}: none of its first entries can be read ({first_fault}). Is it this format?")
    return learn(records, config.background, path)


def _names(path: str | None, count: int) -> tuple[tuple[str, ...], bool]:
    """(names, whether somebody gave them): a name a line, up to a comma as in objects_vocab.txt; or else numbers."""
    if path is None:
        return tuple(map(str, range(count))), False
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PairmillError(f"{path} cannot be read as a list of names: {error}.") from None
    return tuple(line.split(",")[0].strip() for line in lines if line.strip()), True


def _join(
    dataset: Dataset, entries: Entries, path: str, rules: Sequence[str], config: ImportFeaturesConfig, emit: Emit
) -> Join:
    """Rows and entries, joined. Raises PairmillError: no such column, or under 99 % matched."""
    hashes = Hashes()
    wanted: list[bool] = []
    for shard in range(dataset.num_shards):
        table = read_table(dataset.folder, dataset.stage(PAIRS).file(shard), ["status", "sha256"])
        pairs = zip(
            row_keys(dataset, shard, config.key), *(table[n].to_pylist() for n in table.column_names), strict=True
        )
        for key, status, sha256 in pairs:
            wanted.append(status in (SUCCESS, NO_IMAGE))
            hashes.add(key if wanted[-1] else None, sha256)
    found = join(hashes, np.array(wanted, bool), entries, rules)
    rows, lonely = found.lonely_rows(), found.lonely_entries(entries)
    shown = [_key_at(dataset, int(row), config.key) for row in rows[:_SHOWN]]
    told = (
        f"{int(found.wanted.sum()) - len(rows):,} of {int(found.wanted.sum()):,} rows are in {path}, joined by "
        f"{'the name of the image' if found.rule == 'name' else 'the number that names end with'} "
        f"({config.key or 'url'}). Rows without an entry: {_some(shown, len(rows))}. "
        f"Entries without a row: {_some([entries[int(i)][0] for i in lonely[:_SHOWN]], len(lonely))}."
    )
    shared, twice = np.flatnonzero(hashes.shared()), np.flatnonzero(entries.hashes.shared())
    if len(shared):
        shown = [_key_at(dataset, int(row), config.key) for row in shared[:_SHOWN]]
        told += f" Rows whose name is another image's, too, and joins nothing: {_some(shown, len(shared))}."
    if len(twice):
        shown = [entries[int(i)][0] for i in twice[:_SHOWN]]
        told += f" Entries whose name is another's, too, and joins nothing: {_some(shown, len(twice))}."
    if found.share < LEAST_SHARE and not config.allow_missing:
        raise PairmillError(
            f"Only {told} Nothing written. Give --key COLUMN that names the images, or pass --allow-missing."
        )
    emit(Notice(told, bool(len(rows))))
    return found


def _some(names: Sequence[str], count: int) -> str:
    return "none" if not count else f"{count:,} ({', '.join(names)}{', ...' if count > len(names) else ''})"


def _key_at(dataset: Dataset, row: int, key: str | None) -> str:
    shard, at = dataset.locate(str(row))
    return row_keys(dataset, shard, key)[at] or f"row {row}, which has none"


def _write_joined(path: str, shards: Sequence[int], entry: np.ndarray, entries: Entries) -> None:
    """One record batch a shard: `key` and `place` of each row's entry, null where it has none."""
    schema = pa.schema([pa.field("key", pa.large_binary()), pa.field("place", pa.int64())])
    start = 0
    with pa.OSFile(path, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for rows in shards:
            found = [None if i == NOTHING else entries[i] for i in entry[start : start + rows].tolist()]
            keys = [None if f is None else f[0].encode("utf-8", "surrogateescape") for f in found]
            columns = [pa.array(keys, pa.large_binary()), pa.array([f and f[1] for f in found], pa.int64())]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            start += rows


def _joined(path: str, shard: int) -> list[tuple[str, int] | None]:
    with pa.memory_map(path) as stream:
        batch = pa.ipc.open_file(stream).get_batch(shard)
        keys, places = batch.column("key").to_pylist(), batch.column("place").to_pylist()
    return [
        None if key is None else (key.decode("utf-8", "surrogateescape"), place)
        for key, place in zip(keys, places, strict=True)
    ]


@dataclass(frozen=True)
class Made:
    """What is written of a source, into the stage at `path`; `new`: the pairs, too."""

    source: Source
    layout: Layout
    classes: Classes
    attributes: tuple[str, ...]
    path: str
    new: bool

    def identity(self) -> dict[str, Any]:
        """What decides the rows beside the configuration and the file."""
        layout = {k: v for k, v in asdict(self.layout).items() if k != "boxes_a_row"}
        names = fingerprint({"classes": list(self.classes.names), "attributes": list(self.attributes)})
        return {"layout": layout, "names": names}

    def schema(self) -> pa.Schema:
        """regions-v1 and `error`, which says why a row could not be read."""
        layout = self.layout
        probs = "full" if layout.classes else "none"
        attributes = len(self.attributes) if layout.attributes else 0
        fields = region_fields(layout.dim, layout.classes, probs, attributes)
        names: dict[str, object] = {"classes": list(self.classes.names)}
        names["attributes"] = list(self.attributes) if attributes else []
        return features_schema([*fields, pa.field("error", pa.string())], names)

    @property
    def bytes_per_row(self) -> int:
        return self.layout.boxes_a_row * (2 * (self.layout.dim + self.layout.classes) + 64)


@dataclass(frozen=True)
class ImportWork:
    """Makes one shard's features; of a new dataset its pairs after them. Picklable."""

    dataset: Dataset
    made: Made
    joined: str

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        folder, pairs = self.dataset.folder, self.dataset.stage(PAIRS)
        entries = _joined(self.joined, shard)
        if self.made.new:
            told: list[dict[str, Any]] = [{"status": NO_IMAGE, "sha256": None}] * len(entries)
            digest = pairs_digest(pa.array([NO_IMAGE] * len(told)), pa.nulls(len(told)))
        else:
            told = read_table(folder, pairs.file(shard), ["status", "sha256", *_SIZES]).to_pylist()
            digest = pairs.digest(shard)
        marks = marks_metadata(row_marks([t["status"] for t in told], [t["sha256"] for t in told]))
        schema = self.made.schema()
        schema = schema.with_metadata({**(schema.metadata or {}), **marks})
        seen: list[tuple[int, int] | None] = []
        name = self.dataset.stage(self.made.path).file(shard)
        with self.made.source.open() as read, write_features(folder, name, schema, digest) as writer:
            failed = 0
            for row, (entry, pair) in enumerate(zip(entries, told, strict=True)):
                with hand.hold(row):
                    found, size = self._row(read, entry, pair, row in hand.crashed)
                writer.append(found)
                seen.append(size)
                failed += found["state"] != OK
                hand.progress(row + 1, failed)
        if self.made.new:
            self._pairs(pairs.file(shard), entries, seen)
        return writer.counts

    def _row(
        self, read: Read, entry: tuple[str, int] | None, pair: Mapping[str, Any], crashed: bool
    ) -> tuple[dict[str, Any], tuple[int, int] | None]:
        """(the row, the size of the image as the entry has it)"""
        if pair["status"] not in (SUCCESS, NO_IMAGE):
            return {"state": pair["status"]}, None
        if entry is None:
            return {"state": "missing_file", "error": "no entry in the file"}, None
        if crashed:
            return {"state": "decoder_crash"}, None
        try:
            record = read(*entry)
            stored, original = _size(pair, "width", "height"), _size(pair, "original_width", "original_height")
            made = self.made
            row = row_of(record, made.layout, made.classes, len(made.attributes), Sizes(stored, original))
        except RowError as error:
            return {"state": error.state, "error": f"{entry[0]}: {error}"[:300]}, None
        return row, record.size

    def _pairs(
        self, name: str, entries: Sequence[tuple[str, int] | None], sizes: Sequence[tuple[int, int] | None]
    ) -> None:
        with write_pairs(self.dataset.folder, name, _new_schema()) as writer:
            for entry, size in zip(entries, sizes, strict=True):
                assert entry is not None, "a new dataset has a row for each entry"
                key = entry[0].encode("utf-8", "replace").decode()
                uid, input_uid = given_uid(key)
                row = {"uid": uid, "input_uid": input_uid, "status": NO_IMAGE, KEY: key}
                width, height = size or (None, None)
                writer.append({**row, "original_width": width, "original_height": height})


def _new_schema() -> pa.Schema:
    return pairs_schema([pa.field(KEY, pa.string())])


def _size(pair: Mapping[str, Any], width: str, height: str) -> tuple[int, int] | None:
    sides = (pair.get(width), pair.get(height))
    return sides if all(sides) else None  # type: ignore[return-value]


def _run(
    dataset: Dataset,
    made: Made,
    joined: str,
    config: ImportFeaturesConfig,
    extra: dict[str, Any],
    rule: str,
    emit: Emit,
) -> StageFinished:
    stage = dataset.stage(made.path)
    about = {"format": extra["format"], "file": extra["file"]}
    columns = {
        "boxes": {"what": "x1 y1 x2 y2, px of the stored image, exclusive maximum", **about},
        "features": {"what": "as the file has them, in float16", **about},
    }
    sidecar = make_sidecar(
        COMMAND, stage.name, (FEATURES, VERSION), config, extra, columns, recorded={"joined_by": rule}
    )
    stage.begin(sidecar, _MEND)
    return run_stage(
        stage,
        ImportWork(dataset, made, joined),
        pending=stage.pending(),
        workers=config.workers,
        emit=emit,
        bytes_per_row=made.bytes_per_row,
    )


def _into_new(
    url: str | Path,
    entries: Entries,
    made: Made,
    joined: str,
    config: ImportFeaturesConfig,
    extra: dict[str, Any],
    emit: Emit,
) -> StageFinished:
    """A dataset of the entries, in the file's order; of several with one key the first. dataset.json is written last.

    Raises PairmillError where another dataset stands.
    """
    folder = open_folder(url)
    firsts = entries.hashes.firsts()
    if len(firsts) < len(entries):
        emit(Notice(f"{len(entries) - len(firsts):,} entries have a key that an earlier one has; the first counts."))
    whole, rest = divmod(len(firsts), config.shard_rows)
    manifest = new_manifest(config.shard_rows, [config.shard_rows] * whole + [rest] * (rest > 0))
    dataset = Dataset(folder, manifest)
    _write_joined(joined, manifest.shards, firsts, entries)
    with lock(folder, PAIRS):
        stands = folder.exists(MANIFEST)
        if stands and (read_manifest(folder) != manifest or dataset.stage(PAIRS).sidecar() is None):
            raise PairmillError(f"{folder.url} holds another dataset. Give another place, or leave out --new.")
        pairs = make_sidecar(COMMAND, PAIRS, (PAIRS, PAIRS_VERSION), config, {"input": fingerprint(extra)})
        dataset.stage(PAIRS).begin(pairs, "Give another place, or leave out --new.")
        done = _run(dataset, made, joined, config, extra, "name", emit)
        if not done.left and not stands:
            write_manifest(folder, manifest)
    return done
