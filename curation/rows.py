"""The rows of one shard: fetched all at once, decoded in threads meanwhile, handed back in their order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from curation.body import ByteBudget, Lease
from curation.config import DownloadConfig
from curation.failures import error_text
from curation.fetch import Fetched, Fetcher, host_of
from curation.hosts import Hosts, RowQueue
from curation.resize import Processed, process
from schemas.status import SUCCESS
from shards.images import ImageError

Hold = Callable[[int], AbstractContextManager[object]]


@dataclass(frozen=True)
class Request:
    """One row of a list. `expected_hash` is `sha256:HEX` or `md5:HEX`, None where nothing is to be verified."""

    url: str | None
    expected_hash: str | None = None


@dataclass(frozen=True)
class Result:
    """What became of a row; `image` is there exactly when `status` is success.

    received_bytes  size of the body, 0 where there was none
    fetched_at      when the row was done, in seconds since 1970
    """

    status: str
    fetched_at: float
    image: Processed | None = None
    http_status: int | None = None
    attempts: int = 0
    error: str | None = None
    received_bytes: int = 0


def keep(row: int, result: Result) -> Result:
    """An `on_result` that keeps every result as it is."""
    return result


def fetch_rows(
    rows: Sequence[Request],
    config: DownloadConfig,
    *,
    hold: Hold = contextlib.nullcontext,
    on_result: Callable[[int, Result], Result] = keep,
    hosts: Hosts | None = None,
    workers: int = 1,
) -> list[Result]:
    """One Result per row, in the rows' order, whatever order the network answered in.

    hold       context around the decoding of row i, entered in the decoding thread (`RowInHand.hold`)
    on_result  called as each row is done, in the calling thread; what it returns is kept in its place (a lighter
               one, say, with the image spilled to disk); what it raises stops the run and is raised here
    hosts      connections and failures by host, kept from shard to shard (`curation.fetch.new_hosts`)
    workers    processes of the run, which share `per_host`
    """
    return asyncio.run(_Rows(rows, config, hold, on_result).run(hosts, workers))


class _Rows:
    def __init__(
        self,
        rows: Sequence[Request],
        config: DownloadConfig,
        hold: Hold,
        on_result: Callable[[int, Result], Result],
    ):
        self._rows = rows
        self._config = config
        self._hold = hold
        self._on_result = on_result
        self._results: list[Result | None] = [None] * len(rows)
        self._budget = ByteBudget()
        self._pool = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")

    async def run(self, hosts: Hosts | None, workers: int) -> list[Result]:
        try:
            async with Fetcher(self._config, hosts, workers) as fetcher:
                queue = RowQueue(((i, host_of(row.url)) for i, row in enumerate(self._rows)), fetcher.hosts)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._config.connections, len(self._rows))):
                        group.create_task(self._worker(queue, fetcher))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        return [result for result in self._results if result is not None]

    async def _worker(self, queue: RowQueue, fetcher: Fetcher) -> None:
        while (i := await queue.next()) is not None:
            lease = Lease(self._budget)
            try:
                fetched = await fetcher.fetch(self._rows[i].url, lease)
                result = await self._finished(i, fetched, fetcher)
            finally:
                lease.release()
            fetcher.hosts.limiting = queue.held_up
            self._results[i] = self._on_result(i, result)

    async def _finished(self, i: int, fetched: Fetched, fetcher: Fetcher) -> Result:
        result = Result(fetched.status, time.time(), None, fetched.http_status, fetched.attempts, fetched.error)
        if fetched.data is None:
            return result
        result = replace(result, received_bytes=len(fetched.data))
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self._pool, self._process, i, fetched.data)
        except ImageError as error:
            return replace(result, status=error.status, error=error_text(error.status, error.detail))
        if fetcher.has_opted_out(image.sha256):
            return replace(result, status="disallowed", error=error_text("disallowed", "opt-out"))
        return replace(result, status=SUCCESS, image=image)

    def _process(self, i: int, data: bytes) -> Processed:
        with self._hold(i):
            return process(data, self._config, self._rows[i].expected_hash)


class HopelessWatch:
    """Whether the first rows of a run nearly all fail for one cause: no DNS, a proxy, a block.

    rows   how many of the first rows are looked at
    share  above which share of one cause it is hopeless
    """

    def __init__(self, rows: int = 500, share: float = 0.95):
        self._rows = rows
        self._share = share
        self._seen = 0
        self._causes: Counter[str] = Counter()
        self._example: dict[str, str] = {}

    def observe(self, status: str, http_status: int | None = None, error: str | None = None) -> None:
        """One more row is done. Rows after the first `rows` change nothing."""
        if self._seen == self._rows:
            return
        self._seen += 1
        if status != SUCCESS:
            cause = f"http_error {http_status}" if status == "http_error" else status
            self._causes[cause] += 1
            self._example.setdefault(cause, error or cause)

    @property
    def cause(self) -> str | None:
        """An error text of the one cause, None while too few rows are done or there is hope.

        Rows that met a resting host count with the cause that put hosts to rest: the most frequent other one.
        """
        if self._seen < self._rows:
            return None
        resting = self._causes["host_resting"]
        others = Counter({cause: n for cause, n in self._causes.items() if cause != "host_resting"})
        for cause, count in others.most_common(1):
            if count + resting > self._share * self._rows:
                return self._example[cause]
        return None
