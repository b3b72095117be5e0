"""Pairs and the lists they come from: columns, uids, digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import pyarrow as pa

from schemas.tables import VERSIONS, table_schema

PAIRS, INPUT = "pairs", "input"
VERSION = VERSIONS[PAIRS]

UID = pa.binary(16)
_HEX = re.compile(r"[0-9a-f]{32}\Z")

INPUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("uid", UID),
    pa.field("input_uid", pa.string()),
    pa.field("url", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("expected_hash", pa.string()),  # "sha256:HEX" or "md5:HEX" to verify the download against
)

PAIR_FIELDS: tuple[pa.Field, ...] = (
    pa.field("uid", UID, nullable=False),
    pa.field("input_uid", pa.string()),
    pa.field("url", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("image", pa.large_binary()),
    pa.field("format", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("original_width", pa.int32()),
    pa.field("original_height", pa.int32()),
    pa.field("sha256", pa.binary(32)),
    pa.field("stored_sha256", pa.binary(32)),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("http_status", pa.int16()),
    pa.field("attempts", pa.int16()),
    pa.field("fetched_at", pa.timestamp("ms", tz="UTC")),
)

# The one column of pairs that a rerun after a kill may fill differently.
TIMING_COLUMNS = ("fetched_at",)
RESERVED = frozenset(f.name for f in (*PAIR_FIELDS, *INPUT_FIELDS))


def carried_name(name: str) -> str:
    """The name under which a column of the input is carried: `input_NAME` where NAME is ours."""
    return f"input_{name}" if name in RESERVED else name


def input_schema(carried: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of `input/NNNNN.parquet`."""
    return table_schema(INPUT, VERSION, [*INPUT_FIELDS, *carried])


def pairs_schema(carried: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of `pairs/NNNNN.parquet`."""
    return table_schema(PAIRS, VERSION, [*PAIR_FIELDS, *carried])


def carried_fields(schema: pa.Schema) -> list[pa.Field]:
    """The fields of a pairs or input schema that came with the user's list."""
    return [f for f in schema if f.name not in RESERVED]


def pair_uid(url: str | None, caption: str | None, sha256: bytes | None = None) -> bytes:
    """blake2b-128 of url, a zero byte, caption; without a url, of `sha256:` and the hash of the image's bytes."""
    if url is not None:
        text = url.encode() + b"\0" + (caption or "").encode()
    elif sha256 is not None:
        text = b"sha256:" + sha256
    else:  # text-only rows
        text = b"\0" + (caption or "").encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def given_uid(text: str) -> tuple[bytes, str | None]:
    """(uid, input_uid) of an id the user gave: 32 hex digits as they are, anything else hashed and kept."""
    if _HEX.match(text.lower()):
        return bytes.fromhex(text), None
    return hashlib.blake2b(text.encode(), digest_size=16).digest(), text


def pairs_digest(status: pa.ChunkedArray | pa.Array, sha256: pa.ChunkedArray | pa.Array) -> str:
    """blake2b-128 of the shard's (status, sha256): what scores and features were made from."""
    digest = hashlib.blake2b(digest_size=16)
    for one, image in zip(status.to_pylist(), sha256.to_pylist(), strict=True):
        digest.update(one.encode() + b"\0" + (image or b"") + b"\n")
    return digest.hexdigest()


def uid_share(uid: bytes) -> float:
    """Where a uid falls in [0, 1): `--sample P` and the rule `sample` keep the rows below P."""
    return int.from_bytes(uid[:8], "big") / 2**64
