"""Lists cut into `input/`: one streaming pass, then dataset.json."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from curation.columns import Columns, find_columns, recarried, shape
from curation.list_config import SHARD_ROWS, ListConfig
from curation.list_files import ListFile, find_lists, hash_list, local_copy
from curation.list_readers import Batch, read_batches
from curation.list_text import OddBytes
from schemas.config import fingerprint
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, Progress, silent
from schemas.pairs import uid_share
from schemas.sidecars import ListSource, Manifest
from shards.dataset import INPUT, MANIFEST, Dataset, new_manifest, read_manifest, write_manifest
from shards.files import Folder, check_space, open_folder
from shards.locks import lock
from shards.reader import open_parquet, parquet_footer
from shards.writer import write_table

CUT = b"pairmill.cut"
Piece: TypeAlias = tuple[int, pa.Table]  # the list it comes from, rows


def cut(lists: Sequence[str], output: str | Path, config: ListConfig, emit: Emit = silent) -> Dataset:
    """The dataset of these lists: cut now, gone on with where a run was stopped, or as it stands.

    Without lists, the dataset that stands. Raises PairmillError: no or empty lists, unknown columns, a dataset that was
    made from other lists (without `extend`), a list that cannot be read.
    """
    folder = open_folder(output)
    stands = folder.exists(MANIFEST)
    if not lists and stands:
        return Dataset.open(output)
    files = find_lists(lists, folder)
    old = read_manifest(folder) if stands else None
    if old is not None:
        _check_shard_rows(old, config, folder)
        files = _new_files(files, old, config, folder, emit)
        if not files:
            return Dataset(folder, old)
    check_space(folder, sum(f.bytes for f in files), "Cutting the lists")
    reading = _Reading(files, config, _carried_schema(folder, old), emit)
    tables = reading.tables()
    first = next(tables, None)  # fails here, before anything is written, where columns are not found
    if first is None:
        raise PairmillError(f"{', '.join(f.name for f in files[:5])}: no rows to take. Nothing written.")
    with lock(folder, INPUT):
        return _cut(folder, old, reading, first, tables)


def _check_shard_rows(old: Manifest, config: ListConfig, folder: Folder) -> None:
    if config.shard_rows not in (SHARD_ROWS, old.shard_rows):
        raise PairmillError(
            f"{folder.url} has shards of {old.shard_rows:,} rows, --shard-rows says {config.shard_rows:,}. "
            "Leave the option out, or cut another dataset."
        )


def _new_files(files: list[ListFile], old: Manifest, config: ListConfig, folder: Folder, emit: Emit) -> list[ListFile]:
    """Those of `files` that the dataset does not have yet; without `extend` there must be none."""
    known = {(s.bytes, s.hash): s for s in old.lists}
    new = []
    for file in files:
        source = known.get((file.bytes, _hash(file))) if any(file.bytes == s.bytes for s in old.lists) else None
        if source is None:
            new.append(file)
        else:
            _check_choices(source, config, folder)
    if new and not config.extend:
        raise PairmillError(
            f"{folder.url} was made from other lists ({_names([s.name for s in old.lists])}): "
            f"{_names([f.name for f in new])} is not among them, or has changed. Nothing written. "
            "Pass --extend to append, or choose another output."
        )
    if config.extend and len(new) < len(files):
        emit(Notice(f"{len(files) - len(new)} of {len(files)} lists are in {folder.url} already."))
    return new


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _hash(file: ListFile) -> str:
    with local_copy(file) as path:
        return hash_list(path)


def _check_choices(source: ListSource, config: ListConfig, folder: Folder) -> None:
    """What the user says now must be what was said when the list was cut; what is left out may stay out."""
    for name, value in config.cut_choices().items():
        if source.cut.get(name) != value:
            raise PairmillError(
                f"{folder.url} was cut from {source.name} with `{name}` {source.cut.get(name)!r}, now it is {value!r}. "
                "Nothing written. Leave the option out, or choose another output."
            )


def _carried_schema(folder: Folder, old: Manifest | None) -> pa.Schema | None:
    """The schema that further rows must have: that of the rows that stand."""
    if old is None or not old.shards:
        return None
    for stage in (INPUT, "pairs"):
        names = [n for n in folder.names(stage) if n.endswith(".parquet")]
        if names:
            with open_parquet(folder, f"{stage}/{names[0]}") as file:
                return file.schema_arrow
    return None


class _Reading:
    """The rows of all lists in order, as tables of `input/`, and what was learnt of each list."""

    def __init__(self, files: list[ListFile], config: ListConfig, schema: pa.Schema | None, emit: Emit) -> None:
        self.files, self.config, self.emit = files, config, emit
        self.schema = schema
        self.hashes: list[str] = []
        self.columns: Columns | None = None
        self.rows = 0

    def tables(self) -> Iterator[Piece]:
        """(index of the list, rows), at most `limit` rows in all."""
        for index, file in enumerate(self.files):
            with local_copy(file) as path:
                self.hashes.append(hash_list(path))
                if self._full():
                    continue
                for table in self._of_file(file, path):
                    self.rows += len(table)
                    yield index, table
                    if self._full():
                        break

    def _full(self) -> bool:
        return self.config.limit is not None and self.rows >= self.config.limit

    def _of_file(self, file: ListFile, path: Path) -> Iterator[pa.Table]:
        odd = OddBytes()
        columns: Columns | None = None
        unknown: set[str] = set()
        at = 0
        for batch in read_batches(file, path, self.config.encoding, odd):
            if columns is None:
                columns = self._columns(batch, file)
            self._tell_unknown(batch, columns, file, unknown)
            table = self._taken(shape(batch, columns, f"{file.name} rows {at:,} to {at + batch.rows - 1:,}"))
            at += batch.rows
            if len(table):
                yield table
        if odd.count:
            text = f"{odd.count:,} bytes are no UTF-8 and were read as Windows-1252 (--encoding NAME for another)"
            self._warn(f"{file.name}: {text}.")

    def _columns(self, batch: Batch, file: ListFile) -> Columns:
        columns = find_columns(batch, self.config, file.name)
        if self.schema is None:
            self.schema = columns.schema
            self._tell(columns, file)
        else:
            columns = recarried(columns, self.schema)
            absent = [c.source for c in columns.carried if c.source not in batch.columns]
            if absent:
                self._warn(f"{file.name} lacks columns of the first list; they are null: {_names(absent)}.")
        self.columns = self.columns or columns
        return columns

    def _tell(self, columns: Columns, file: ListFile) -> None:
        caption = f"caption is `{columns.caption}`" if columns.caption else "there are no captions (--caption NAME)"
        also = f", uid is `{columns.uid}`" if columns.uid else ""
        also += f", bytes are verified against `{columns.expected_hash}`" if columns.expected_hash else ""
        self.emit(Notice(f"{file.name}: URL is `{columns.url}`, {caption}{also}."))
        for ours, name in columns.renamed.items():
            self.emit(Notice(f"{file.name}: column `{name}` is carried as `{ours}`."))

    def _tell_unknown(self, batch: Batch, columns: Columns, file: ListFile, unknown: set[str]) -> None:
        """Columns that come up after the first rows of the first list are not carried."""
        roles = {columns.url, columns.caption, columns.uid, columns.expected_hash}
        new = batch.columns.keys() - roles - {c.source for c in columns.carried} - unknown
        if new:
            unknown |= new
            self._warn(f"{file.name}: not carried, since the first rows had no such column: {_names(sorted(new))}.")

    def _warn(self, text: str) -> None:
        self.emit(Notice(text, warning=True))

    def _taken(self, table: pa.Table) -> pa.Table:
        share = self.config.sample
        if share is not None:
            table = table.filter(pa.array([uid_share(uid) < share for uid in table["uid"].to_pylist()], pa.bool_()))
        return table if self.config.limit is None else table.slice(0, self.config.limit - self.rows)


def _cut(folder: Folder, old: Manifest | None, reading: _Reading, first: Piece, tables: Iterator[Piece]) -> Dataset:
    config = reading.config
    before = old.shards if old else ()
    shard_rows = old.shard_rows if old else config.shard_rows
    sizes: list[int] = []
    begins = [0] * len(reading.files)
    known = {"choices": config.cut_choices(), "shard_rows": shard_rows, "before": list(before)}
    blank = Dataset(folder, old or new_manifest(shard_rows, ())).stage(INPUT)
    shown = time.monotonic()
    for index, table in _in_shards(first, tables, shard_rows):
        shard = len(before) + len(sizes)
        # The rows are a pure function of these: a shard that carries the same mark stands already.
        mark = fingerprint({**known, "shard": shard, "lists": list(reading.hashes)})
        _write_shard(folder, blank.file(shard), table, mark)
        sizes.append(len(table))
        begins[index] += 1
        if time.monotonic() - shown > 0.5:
            reading.emit(Progress(INPUT, sum(sizes), 0, "cutting the list"))
            shown = time.monotonic()
    for name in folder.names(INPUT):  # of a run that was stopped and had more
        stem = name.removesuffix(".parquet")
        if stem.isdigit() and int(stem) >= len(before) + len(sizes):
            folder.remove(f"{INPUT}/{name}")
    manifest = _grown(old, reading, shard_rows, sizes, begins)
    write_manifest(folder, manifest)
    reading.emit(Notice(f"{sum(sizes):,} rows of {len(reading.files)} lists in {len(sizes):,} shards."))
    return Dataset(folder, manifest)


def _in_shards(first: Piece, tables: Iterator[Piece], shard_rows: int) -> Iterator[Piece]:
    """(list in which the shard begins, its rows); only the last one is short."""
    pieces = chain([first], tables)
    waiting: deque[Piece] = deque()
    while True:
        while sum(len(table) for _, table in waiting) < shard_rows and (piece := next(pieces, None)) is not None:
            waiting.append(piece)
        if not waiting:
            return
        begin, missing, parts = waiting[0][0], shard_rows, []
        while waiting and missing:
            index, table = waiting.popleft()
            parts.append(table.slice(0, missing))
            if len(table) > missing:
                waiting.appendleft((index, table.slice(missing)))
            missing -= len(parts[-1])
        yield begin, pa.concat_tables(parts)


def _write_shard(folder: Folder, name: str, table: pa.Table, mark: str) -> None:
    if folder.exists(name) and parquet_footer(folder, name).get(CUT, b"").decode() == mark:
        return
    meta = {**(table.schema.metadata or {}), CUT: mark.encode()}
    write_table(folder, name, table.replace_schema_metadata(meta).combine_chunks(), {"rows": len(table)})


def _grown(old: Manifest | None, reading: _Reading, shard_rows: int, sizes: list[int], begins: list[int]) -> Manifest:
    choices = json.loads(json.dumps(reading.config.cut_choices()))
    sources = [
        ListSource(name=file.name, bytes=file.bytes, hash=digest, shards=count, cut=choices)
        for file, digest, count in zip(reading.files, reading.hashes, begins, strict=True)
    ]
    if old is not None:
        return old.model_copy(update={"shards": (*old.shards, *sizes), "lists": (*old.lists, *sources)})
    renamed = reading.columns.renamed if reading.columns else {}
    return new_manifest(shard_rows, sizes, sources, renamed)


def sampled_input(lists: Sequence[str], config: ListConfig, rows: int, emit: Emit = silent) -> tuple[pa.Table, int]:
    """(the `rows` rows with the smallest uids, number of all rows) of the lists, in one pass; nothing is written.

    Raises PairmillError as `cut` does.
    """
    reading = _Reading(find_lists(lists), config, None, emit)
    best: pa.Table | None = None
    for _, table in reading.tables():
        best = table if best is None else pa.concat_tables([best, table])
        if len(best) > rows:
            order = sorted(range(len(best)), key=best["uid"].to_pylist().__getitem__)[:rows]
            best = best.take(sorted(order))
    if best is None:
        raise PairmillError(f"{_names(list(lists))}: no rows to take.")
    return best, reading.rows
