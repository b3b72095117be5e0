"""A join of two lists that fits no memory: entries and the texts that belong to them meet in a temporary file."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from typing import Any


class Meeting:
    """Entries and the texts that belong to each, in a temporary file; both keep the order they came in."""

    def __enter__(self) -> Meeting:
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pairmill-join-"))
        self.db = self._stack.enter_context(contextlib.closing(sqlite3.connect(f"{folder}/join.sqlite")))
        self.db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE;"
            "CREATE TABLE entries (key TEXT, value TEXT); CREATE TABLE texts (key TEXT, value TEXT);"
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add_entry(self, key: Any, value: dict[str, Any]) -> None:
        self.db.execute("INSERT INTO entries VALUES (?, ?)", (_key(key), json.dumps(value)))

    def add_text(self, key: Any, text: str) -> None:
        self.db.execute("INSERT INTO texts VALUES (?, ?)", (_key(key), json.dumps(text)))

    def meet(self) -> None:
        """Call it when all are added."""
        self.db.execute("CREATE INDEX of_texts ON texts (key)")
        self.db.execute("CREATE INDEX of_entries ON entries (key)")

    def entries(self) -> Iterator[dict[str, Any]]:
        return (json.loads(value) for (value,) in self.db.execute("SELECT value FROM entries ORDER BY rowid"))

    def entry(self, key: Any) -> dict[str, Any]:
        """The first of that key, or {} where there is none."""
        found = self.db.execute("SELECT value FROM entries WHERE key = ? ORDER BY rowid LIMIT 1", (_key(key),))
        return next((json.loads(value) for (value,) in found), {})

    def texts(self, key: Any) -> list[str]:
        """Those of an entry."""
        found = self.db.execute("SELECT value FROM texts WHERE key = ? ORDER BY rowid", (_key(key),))
        return [json.loads(value) for (value,) in found]

    def orphans(self) -> Iterator[Any]:
        """Keys of texts that have no entry, in order of their first text."""
        query = "SELECT key FROM texts WHERE key NOT IN (SELECT key FROM entries) GROUP BY key ORDER BY min(rowid)"
        return (json.loads(key) for (key,) in self.db.execute(query))


def _key(key: Any) -> str:
    return json.dumps(key)
