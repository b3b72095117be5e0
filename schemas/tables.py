"""What every table of ours carries: its name and version in the schema metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from schemas.errors import PairmillError

_NAME, _VERSION = b"pairmill.schema", b"pairmill.version"

# The newest version of each table that this program writes and reads.
VERSIONS = {"pairs": 1, "input": 1, "scores": 1, "features": 1, "tasks": 1, "selection": 1}

# Footer entries of shard files.
COUNTS = b"pairmill.counts"  # JSON: rows by status or state
DIGEST = (
    b"pairmill.digest"  # pairs: blake2b of (status, sha256); scores, features: that of the pairs they were made from
)
WHOLE = b"pairmill.whole"  # scores that tell of the whole dataset: digest of the digests of all its pairs shards


def table_schema(
    name: str, version: int, fields: Iterable[pa.Field], extra: dict[bytes, bytes] | None = None
) -> pa.Schema:
    """A schema that says what it is."""
    meta = {_NAME: name.encode(), _VERSION: str(version).encode(), **(extra or {})}
    return pa.schema(list(fields), metadata=meta)


def check_schema(schema: pa.Schema, name: str, version: int, where: str) -> None:
    """Raises PairmillError where the file is another kind of table or newer than this program."""
    found, number = table_version(schema.metadata)
    if found != name:
        raise PairmillError(f"{where} holds {found or 'no pairmill table'}, expected {name}.")
    check_version(name, number, version, where)


def table_version(metadata: Mapping[bytes, bytes] | None) -> tuple[str, int]:
    """(name, version) as a schema's metadata tells them; ("", 0) where it is no table of ours."""
    meta = metadata or {}
    number = meta.get(_VERSION, b"0")
    return meta.get(_NAME, b"").decode(errors="replace"), int(number) if number.isdigit() else 0


def check_version(name: str, number: int, version: int, where: str) -> None:
    """Raises PairmillError where `number` is newer than `version`."""
    if number > version:
        raise PairmillError(
            f"{where} was written as {name} version {number}; this pairmill reads up to {version}. "
            "Install a newer pairmill."
        )
