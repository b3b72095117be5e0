"""One shard of pairs: its rows fetched, or those of them whose failure may pass tried again."""

from __future__ import annotations

import errno
import functools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from curation.config import DownloadConfig
from curation.failures import error_text
from curation.fetch import host_of
from curation.hosts import Hosts
from curation.removed import read_removed
from curation.rows import HopelessWatch, Request, Result, fetch_rows
from schemas.errors import PairmillError
from schemas.pairs import carried_fields, pairs_schema
from schemas.status import SUCCESS, is_transient
from shards.dataset import INPUT, PAIRS, Dataset
from shards.hand import RowInHand
from shards.reader import open_parquet, read_table, row_groups
from shards.writer import write_pairs

RECEIVED = pa.field("probe_received_bytes", pa.int64())
_MOST_ATTEMPTS = 2**15 - 1
_ADVICE = {
    "dns_error": "Names do not resolve: check that this machine is online and its name server answers.",
    "connect_error": "No connection comes about: check the network, a firewall, or pass --proxy-from-environment.",
    "timeout": "Nothing answers in time: check the network, or pass a longer --timeout.",
    "blocked": "The hosts have addresses that are not public: pass --allow-private for a mirror of your own.",
    "bad_url": "Those are no URLs: check --url.",
    "hash_mismatch": "The bytes are others than the list's hashes say: pass --sha256 none to take them.",
    "not_image": "Something else than images comes back: a login page, or a proxy?",
}


class Spool:
    """The shard's images until all rows are in: on disk, in a file without a name, so memory stays small."""

    def __init__(self, dataset: Dataset) -> None:
        local = dataset.folder.local
        self._file = tempfile.TemporaryFile(dir=local / PAIRS if local is not None else None)  # noqa: SIM115
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def keep(self, row: int, result: Result) -> Result:
        """The result without its image's bytes. Raises PairmillError when the disk is full."""
        if result.image is None:
            return result
        data = result.image.image
        try:
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PairmillError(
                "No space left for the images of a shard. What stands is whole: free space and run this again."
            ) from None
        self._places[row] = (self._end, len(data))
        self._end += len(data)
        return replace(result, image=replace(result.image, image=b""))

    def image(self, row: int) -> bytes | None:
        """The image's bytes, None where the row has none."""
        if row not in self._places:
            return None
        start, length = self._places[row]
        self._file.seek(start)
        return self._file.read(length)


class _Live:
    """Counts rows as they are done and tells which host alone holds the shard up."""

    def __init__(self, requests: Mapping[int, Request], per_host: int, before: int, hand: RowInHand) -> None:
        self._hosts = {row: host_of(request.url) for row, request in requests.items()}
        self._left = Counter(self._hosts.values())
        self._per_host = per_host
        self._done, self._failed = before, 0
        self._hand = hand

    def done(self, row: int, result: Result) -> None:
        host = self._hosts[row]
        self._left[host] -= 1
        if not self._left[host]:
            del self._left[host]
        self._done += 1
        self._failed += result.status != SUCCESS
        self._hand.progress(self._done, self._failed, self._note())

    def _note(self) -> str:
        if len(self._left) != 1:
            return ""
        host, rows = next(iter(self._left.items()))
        return f"{host} alone limits the run (--per-host)" if host and rows > self._per_host else ""


# Connections and failures by host outlive a shard: one account a thread, of the run that is going on.
_accounts = threading.local()


def _hosts(run: str, per_host: int, config: DownloadConfig) -> Hosts:
    if getattr(_accounts, "run", None) != run:
        _accounts.run, _accounts.hosts = run, Hosts(per_host, config.host_failures, config.host_rest)
    return _accounts.hosts


@dataclass(frozen=True)
class Fetching:
    """How the rows of this run are fetched. `run` is another for each run, `workers` share `per_host`."""

    config: DownloadConfig
    workers: int
    run: str

    def fetch(
        self, requests: Mapping[int, Request], spool: Spool, hand: RowInHand, before: int, watch: HopelessWatch | None
    ) -> dict[int, Result]:
        """The result of every row, its image in the spool. `before` rows of the shard needed no fetching.

        Raises PairmillError when it is hopeless.
        """
        order = list(requests)
        share = max(1, self.config.per_host // self.workers)
        live = _Live(requests, share, before, hand)

        def done(i: int, result: Result) -> Result:
            live.done(order[i], result)
            if watch is not None:
                watch.observe(result.status, result.http_status, result.error)
                if watch.cause is not None:
                    raise hopeless(watch.cause)
            return spool.keep(order[i], result)

        asked = [requests[row] for row in order]
        results = self._engine()(asked, self.config, hold=lambda i: hand.hold(order[i]), on_result=done)
        return dict(zip(order, results, strict=True))

    def _engine(self) -> Callable[..., list[Result]]:
        if self.config.engine == "img2dataset":
            from curation.engine_img2dataset import fetch_rows as fetch_their_way

            return fetch_their_way
        share = max(1, self.config.per_host // self.workers)
        return functools.partial(fetch_rows, hosts=_hosts(self.run, share, self.config), workers=self.workers)


def hopeless(cause: str) -> PairmillError:
    """The error that stops a run in which nearly all of the first rows fail for one cause."""
    advice = _ADVICE.get(cause.partition(":")[0].partition(" ")[0], "")
    return PairmillError(
        f"Over 95 % of the first rows fail for one cause: {cause}. {advice + ' ' if advice else ''}"
        "Stopped; shards that stand are whole (--retry-failed tries their failures again). --keep-going goes on."
    )


@dataclass(frozen=True)
class DownloadShard:
    """Makes `pairs/NNNNN.parquet` of `input/NNNNN.parquet`. A ShardWork.

    watched   shards whose first rows tell whether the run is hopeless
    received  adds the size of each body as received, for a probe
    """

    dataset: Dataset
    fetching: Fetching
    watched: frozenset[int] = frozenset()
    received: bool = False

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        folder = self.dataset.folder
        table = read_table(folder, self.dataset.stage(INPUT).file(shard))
        rows = table.to_pylist()
        settled = {i: _settled(status) for i, status in _settled_rows(self.dataset, rows, hand).items()}
        requests = {i: Request(r["url"], r["expected_hash"]) for i, r in enumerate(rows) if i not in settled}
        watch = HopelessWatch() if shard in self.watched else None
        extra = [RECEIVED] if self.received else []
        schema = pairs_schema([*carried_fields(table.schema), *extra])
        with Spool(self.dataset) as spool:
            results = self.fetching.fetch(requests, spool, hand, len(settled), watch)
            results.update(settled)
            with write_pairs(folder, self.dataset.stage(PAIRS).file(shard), schema) as writer:
                for i, row in enumerate(rows):
                    del row["expected_hash"]
                    more = {RECEIVED.name: results[i].received_bytes} if self.received else {}
                    writer.append({**row, **pair_columns(results[i], spool.image(i)), **more})
        return dict(writer.counts)


def _settled_rows(dataset: Dataset, rows: list[dict[str, Any]], hand: RowInHand) -> dict[int, str]:
    """Rows that are not fetched -> their status."""
    removed = read_removed(dataset.folder)
    found = {i: "removed" for i, row in enumerate(rows) if removed.has(row["uid"], row["url"])}
    return {**dict.fromkeys(hand.crashed, "decoder_crash"), **found}


def _settled(status: str) -> Result:
    detail = "on request" if status == "removed" else "the decoder took its worker down"
    return Result(status, time.time(), attempts=int(status != "removed"), error=error_text(status, detail))


def pair_columns(result: Result, image: bytes | None) -> dict[str, Any]:
    """The columns of pairs that a download fills."""
    out: dict[str, Any] = {
        "image": image,
        "status": result.status,
        "error": result.error,
        "http_status": result.http_status,
        "attempts": min(result.attempts, _MOST_ATTEMPTS),
        "fetched_at": datetime.fromtimestamp(round(result.fetched_at, 3), UTC),
    }
    fields = ("format", "width", "height", "original_width", "original_height", "sha256", "stored_sha256")
    return {**out, **{name: getattr(result.image, name, None) for name in fields}}


def transient_rows(dataset: Dataset, shard: int) -> list[int]:
    """Rows of a shard that stands whose failure may pass."""
    file = dataset.stage(PAIRS).file(shard)
    if not any(is_transient(s) or s == "http_error" for s in dataset.stage(PAIRS).counts(shard)):
        return []
    table = read_table(dataset.folder, file, ["status", "http_status"])
    states = zip(table["status"].to_pylist(), table["http_status"].to_pylist(), strict=True)
    return [row for row, (status, http) in enumerate(states) if is_transient(status, http)]


@dataclass(frozen=True)
class RetryShard:
    """Fetches rows whose failure may pass and rewrites the shard whole; other rows stay as they are. A ShardWork."""

    dataset: Dataset
    fetching: Fetching

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        folder, file = self.dataset.folder, self.dataset.stage(PAIRS).file(shard)
        again = transient_rows(self.dataset, shard)
        listed = self._listed(shard)
        asked = {row: listed[row] for row in again}
        settled = {i: _settled(s) for i, s in _settled_rows(self.dataset, listed, hand).items() if i in asked}
        requests = {i: Request(r["url"], r.get("expected_hash")) for i, r in asked.items() if i not in settled}
        with open_parquet(folder, file) as parquet:
            schema = parquet.schema_arrow
        with Spool(self.dataset) as spool:
            before = self.dataset.manifest.shards[shard] - len(requests)
            results = {**self.fetching.fetch(requests, spool, hand, before, None), **settled}
            with write_pairs(folder, file, schema) as writer:
                for i, row in _rows(self.dataset, shard):
                    if i in results:
                        new = replace(results[i], attempts=results[i].attempts + (row["attempts"] or 0))
                        row = {**row, **pair_columns(new, spool.image(i))}
                    writer.append(row)
        return dict(writer.counts)

    def _listed(self, shard: int) -> list[dict[str, Any]]:
        """uid, url and expected_hash of every row; an imported dataset has no `input/` and no hashes."""
        input_ = self.dataset.stage(INPUT)
        if self.dataset.folder.exists(input_.file(shard)):
            return read_table(self.dataset.folder, input_.file(shard), ["uid", "url", "expected_hash"]).to_pylist()
        return read_table(self.dataset.folder, self.dataset.stage(PAIRS).file(shard), ["uid", "url"]).to_pylist()


def _rows(dataset: Dataset, shard: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for start, table in row_groups(dataset.folder, dataset.stage(PAIRS).file(shard)):
        yield from enumerate(table.to_pylist(), start)
