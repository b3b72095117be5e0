"""`remove`: takes rows out on request, everywhere. A row keeps its place and its uid, and loses all else.

First `removed.parquet` is written, which later downloads obey; then everything that shows a row is deleted (reports,
matches of selections); then each shard's features, scores and task rows, its pairs, its input. A run that was killed
is gone on with by the same command, or by one with any other list: what to blank is told by removed.parquet.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from curation.list_files import find_lists, local_copy
from curation.list_readers import read_batches
from curation.list_text import OddBytes
from curation.maintenance_config import RemoveConfig
from curation.removed import REMOVED
from curation.reshard import score_counts
from extractors.resume import MARKS, marks_metadata, row_marks
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from schemas.pairs import INPUT, PAIRS, UID, given_uid, pairs_digest
from schemas.tables import COUNTS, DIGEST
from shards.dataset import Dataset, Stage
from shards.locks import lock
from shards.reader import MappedShard, read_table, row_groups
from shards.scan import scan, starts
from shards.select import selections
from shards.writer import write_features, write_pairs, write_table

STATUS = "removed"
ERROR = "removed: on request"
SCHEMA = pa.schema([pa.field("uid", UID), pa.field("url", pa.string())])
_HEX = re.compile(r"[0-9a-fA-F]{32}\Z")


@dataclass
class Request:
    """What a list asks for: uids (16 bytes) and urls."""

    uids: set[bytes] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Removal:
    """What became of a request.

    rows      rows taken out by this run
    unknown   entries of the list that name no row of the dataset; later downloads obey them too
    files     files that were rewritten or deleted
    """

    rows: int
    unknown: int
    files: int


def remove(dataset: Dataset | str | Path, config: RemoveConfig, emit: Emit = silent) -> Removal:
    """Takes the rows that a list names out of input, pairs, scores, features and task sets.

    The row's status becomes `removed`, its uid stays; every other column is null. Selections made before are out of
    date; reports and the pictures beside selections are deleted.
    Raises PairmillError: a list that cannot be read, or without uids and urls; another process at work on the dataset.
    """
    data = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    wanted = read_request(config.list)
    with ExitStack() as locks:
        for path in (PAIRS, *(s.path for s in data.stages() if s.path != PAIRS), *_selection_locks(data)):
            locks.enter_context(lock(data.folder, path))
        found = _matches(data, wanted)
        unknown = len(wanted.uids - set(found["uid"])) + len(wanted.urls - set(found["url"].drop_nulls()))
        uids = _note(data, wanted, found)
        work = _Blanking(data, uids)
        files = work.delete_pictures() + sum(work.blank(shard) for shard in range(data.num_shards))
        files += work.drop_tasks()
        _log(data, config.list, work.rows)
    if work.rows and selections(data):
        emit(
            Notice(f"Selections made before are out of date: run their filters again ({', '.join(selections(data))}).")
        )
    return Removal(len(work.rows), unknown, files)


def _selection_locks(dataset: Dataset) -> list[str]:
    return [f"selections/{name}" for name in selections(dataset)]


def read_request(path: str) -> Request:
    """The list's columns `uid` (32 hex digits, or an id as it was given) and `url`; of a .txt one of both a line.

    Raises PairmillError: no such list, none of these columns, nothing in them.
    """
    out = Request()
    for file in find_lists([path]):
        with local_copy(file) as local:
            for batch in read_batches(file, local, None, OddBytes()):
                names = {name.lower(): name for name in batch.columns}
                if not names.keys() & {"uid", "url"}:
                    raise PairmillError(
                        f"{file.name} has no column `uid` or `url`. It has: {', '.join(batch.columns)}."
                    )
                for value in _texts(batch.columns.get(names.get("uid", ""), [])):
                    out.uids.add(given_uid(value)[0])
                for value in _texts(batch.columns.get(names.get("url", ""), [])):
                    if file.kind == "txt" and _HEX.match(value):
                        out.uids.add(bytes.fromhex(value))
                    else:
                        out.urls.add(value)
    if not out.uids and not out.urls:
        raise PairmillError(f"{path} names no uid and no url. Nothing removed.")
    return out


def _texts(values: Any) -> Iterator[str]:
    for value in values.to_pylist() if isinstance(values, pa.Array) else values:
        if isinstance(value, bytes) and len(value) == 16:
            yield value.hex()
        elif value not in (None, ""):
            yield str(value).strip()


def _stages_with_urls(dataset: Dataset) -> list[tuple[Stage, list[int]]]:
    """Input and pairs, with the shards that stand: an import has no input, an unfinished download not all pairs."""
    found = [(dataset.stage(path), sorted(dataset.stage(path).standing())) for path in (INPUT, PAIRS)]
    return [(stage, shards) for stage, shards in found if shards]


def _matches(dataset: Dataset, wanted: Request) -> pl.DataFrame:
    """uid and url of the rows that are asked for, each pair of them once."""
    uids = pl.Series(sorted(wanted.uids), dtype=pl.Binary)
    urls = pl.Series(sorted(wanted.urls), dtype=pl.String)
    hit = pl.col("uid").is_in(uids.implode()) | pl.col("url").is_in(urls.implode()).fill_null(False)
    parts = [scan(stage, shards).select("uid", "url").filter(hit) for stage, shards in _stages_with_urls(dataset)]
    return pl.concat(parts).unique().sort("uid", "url").collect(engine="streaming")


def _note(dataset: Dataset, wanted: Request, found: pl.DataFrame) -> pl.Series:
    """Adds the request to removed.parquet; the uids of all that was ever removed, sorted."""
    folder = dataset.folder
    empty = pa.table({"uid": [], "url": []}, SCHEMA)
    old = read_table(folder, REMOVED) if folder.exists(REMOVED) else empty
    uids = {*wanted.uids, *found["uid"], *(_column(old, "uid"))}
    urls = {*wanted.urls, *(_column(old, "url"))}
    rows = [{"uid": u, "url": None} for u in sorted(uids)] + [{"uid": None, "url": u} for u in sorted(urls)]
    write_table(folder, REMOVED, pa.Table.from_pylist(rows, schema=SCHEMA), {"rows": len(rows)})
    return pl.Series(sorted(uids), dtype=pl.Binary)


def _column(table: pa.Table, name: str) -> list[Any]:
    return [v for v in table[name].to_pylist() if v is not None] if name in table.column_names else []


class _Blanking:
    """Takes rows out of the files of a dataset, one shard at a time."""

    def __init__(self, dataset: Dataset, uids: pl.Series) -> None:
        self.dataset, self.folder = dataset, dataset.folder
        self.rows: list[dict[str, Any]] = []  # what the log tells: uid, shard, row
        self._at: dict[int, np.ndarray] = {}  # shard -> rows whose uid is removed
        self._shown = False  # whether a row of them still has its picture
        for stage, shards in _stages_with_urls(dataset):
            wanted = ["uid", "status"] if stage.path == PAIRS else ["uid"]
            frame = scan(stage, shards).select(wanted).with_row_index("at")
            found = frame.filter(pl.col("uid").is_in(uids.implode())).collect(engine="streaming")
            self._shown |= "status" in found and bool((found["status"] != STATUS).any())
            index = found["at"].to_numpy()
            begin = starts(dataset, shards)
            owner = np.searchsorted(begin, index, side="right") - 1
            self._at |= {shards[s]: index[owner == s] - begin[s] for s in np.unique(owner)}

    def delete_pictures(self) -> int:
        """Reports and matches hold thumbnails and captions: they go where a row is about to."""
        if not self._shown:
            return 0
        names = [f"reports/{n}" for n in self.folder.names("reports")]
        names += [f"selections/{n}" for n in self.folder.names("selections") if n.endswith(".matches.json")]
        for name in names:
            self.folder.remove(name)
        return len(names)

    def blank(self, shard: int) -> int:
        """Blanks the rows of one shard wherever they are still whole; the number of files written."""
        rows = self._at.get(shard)
        if rows is None:
            return 0
        pairs = self.dataset.stage(PAIRS)
        files = 0
        if shard in pairs.standing():
            status = read_table(self.folder, pairs.file(shard), ["uid", "status", "sha256"])
            fresh = [row for row in rows.tolist() if status["status"][row].as_py() != STATUS]
            after = _blanked(status, rows, {"uid": status["uid"], "status": STATUS})
            files += sum(self._derived(stage, shard, rows, after) for stage in self.dataset.stages())
            if fresh:
                self._pairs(shard, rows)
                uids = status["uid"].to_pylist()
                self.rows += [{"uid": uids[row].hex(), "shard": shard, "row": row} for row in fresh]
                files += 1
        return files + self._input(shard, rows)

    def _derived(self, stage: Stage, shard: int, rows: np.ndarray, after: pa.Table) -> bool:
        """A shard of scores or features. Those of other rows stay up to date: they get the pairs' new digest."""
        if stage.kind not in ("scores", "features") or shard not in stage.standing():
            return False
        old, new = stage.digest(shard), pairs_digest(after["status"], after["sha256"])
        current = self.dataset.stage(PAIRS).digest(shard)
        digest = new if old in (current, new) else old
        write = self._scores if stage.kind == "scores" else self._features
        return write(stage, shard, rows, digest, after)

    def _scores(self, stage: Stage, shard: int, rows: np.ndarray, digest: str, after: pa.Table) -> bool:
        table = read_table(self.folder, stage.file(shard))
        states = [name for name in table.column_names if name.endswith("state")]
        blanked = _blanked(table, rows, dict.fromkeys(states, STATUS))
        if blanked.equals(table) and stage.digest(shard) == digest:
            return False
        blanked = blanked.replace_schema_metadata(_without_footer(table.schema))
        write_table(self.folder, stage.file(shard), blanked, score_counts(blanked), digest)
        return True

    def _features(self, stage: Stage, shard: int, rows: np.ndarray, digest: str, after: pa.Table) -> bool:
        mapped = MappedShard(self.folder, stage.file(shard))
        states = mapped.states()
        if all(states[row] == STATUS for row in rows) and stage.digest(shard) == digest:
            return False
        gone = set(rows.tolist())
        metadata = dict(mapped.schema.metadata or {})
        if MARKS in metadata:
            metadata |= marks_metadata(row_marks(after["status"].to_pylist(), after["sha256"].to_pylist()))
        schema = mapped.schema.with_metadata(metadata)
        with write_features(self.folder, stage.file(shard), schema, digest) as writer:
            for row in range(len(mapped)):
                writer.append({"state": STATUS} if row in gone else mapped.row(row))
        return True

    def _pairs(self, shard: int, rows: np.ndarray) -> None:
        name = self.dataset.stage(PAIRS).file(shard)
        groups = row_groups(self.folder, name)
        first, table = next(groups)
        with write_pairs(self.folder, name, table.schema.with_metadata(_without_footer(table.schema))) as writer:
            while True:
                inside = rows[(rows >= first) & (rows < first + len(table))] - first
                writer.extend(_blanked(table, inside, {"uid": table["uid"], "status": STATUS, "error": ERROR}))
                if (more := next(groups, None)) is None:
                    break
                first, table = more

    def _input(self, shard: int, rows: np.ndarray) -> bool:
        stage = self.dataset.stage(INPUT)
        if shard not in stage.standing():
            return False
        name = stage.file(shard)
        table = read_table(self.folder, name)
        blanked = _blanked(table, rows, {"uid": table["uid"]})
        if blanked.equals(table):
            return False
        footer = {k: v for k, v in stage.footer(shard).items() if k != b"ARROW:schema"}
        counts = json.loads(footer.pop(COUNTS, b"{}"))
        write_table(self.folder, name, blanked.replace_schema_metadata(footer), counts)
        return True

    def drop_tasks(self) -> int:
        """Questions and captions about a removed picture go with it: task rows have no place to keep."""
        files = 0
        for stage in self.dataset.stages():
            for number in sorted(stage.standing()) if stage.kind == "tasks" else ():
                table = read_table(self.folder, stage.file(number))
                images = table["images"].to_pylist()
                keep = [not any(one["row"] in self._at.get(one["shard"], ()) for one in refs) for refs in images]
                if not all(keep):
                    left = table.filter(pa.array(keep))
                    splits = Counter(left["split"].to_pylist())
                    write_table(self.folder, stage.file(number), left, splits)
                    files += 1
        return files


def _blanked(table: pa.Table, rows: np.ndarray, keep: dict[str, Any]) -> pa.Table:
    """The table with null in these rows, but for the columns in `keep`: as they are, or one text for all."""
    index = np.arange(len(table))
    gone: np.ndarray = np.zeros(len(table), bool)
    gone[rows] = True
    null = table.take(pa.array(index, mask=gone))
    columns = []
    for name in table.column_names:
        value = keep.get(name)
        if isinstance(value, str):
            columns.append(pc.if_else(pa.array(gone), pa.scalar(value, table.schema.field(name).type), table[name]))
        else:
            columns.append(null[name] if value is None else value)
    return pa.Table.from_arrays(columns, schema=table.schema)


def _without_footer(schema: pa.Schema) -> dict[bytes, bytes]:
    return {k: v for k, v in (schema.metadata or {}).items() if k not in (COUNTS, DIGEST)}


def _log(dataset: Dataset, path: str, rows: list[dict[str, Any]]) -> None:
    """`logs/remove.TIME.HOST.PID.jsonl`: when, by which list, which rows."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    head = {"event": "Removed", "at": time.time(), "list": path.rstrip("/").rsplit("/", 1)[-1], "rows": len(rows)}
    lines = "".join(json.dumps(line) + "\n" for line in (head, *rows))
    dataset.folder.write_bytes(f"logs/remove.{stamp}.{socket.gethostname()}.{os.getpid()}.jsonl", lines.encode())
