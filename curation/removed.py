"""`removed.parquet`: what was taken out on request. Download, retry and extend obey it."""

from __future__ import annotations

from dataclasses import dataclass

from shards.files import Folder
from shards.reader import read_table

REMOVED = "removed.parquet"


@dataclass(frozen=True)
class Removed:
    """Rows to leave out, by uid or by url whatever the caption."""

    uids: frozenset[bytes] = frozenset()
    urls: frozenset[str] = frozenset()

    def has(self, uid: bytes, url: str | None) -> bool:
        return uid in self.uids or (url is not None and url in self.urls)


def read_removed(folder: Folder) -> Removed:
    """What `removed.parquet` lists: `uid` (16 bytes) and `url`, either may be null or absent; nothing without the file.

    Raises PairmillError for a damaged file.
    """
    if not folder.exists(REMOVED):
        return Removed()
    table = read_table(folder, REMOVED)
    uids, urls = (
        frozenset(v for v in table[name].to_pylist() if v is not None) if name in table.column_names else frozenset()
        for name in ("uid", "url")
    )
    return Removed(uids, urls)
