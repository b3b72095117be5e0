"""What the columns of a list mean, and a batch of it as rows of `input/`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from curation.list_config import NO_COLUMN, ListConfig
from curation.list_readers import Batch, Values
from curation.list_text import legacy_text
from schemas.errors import PairmillError, suggest
from schemas.pairs import INPUT_FIELDS, UID, carried_fields, carried_name, given_uid, input_schema, pair_uid

# Column names of the public lists, the likeliest first; compared as they are, then in any case.
URL_NAMES = ("url", "image_url", "image_urls", "img_url", "image_link", "urls")
CAPTION_NAMES = (
    "caption",
    "captions",
    "text",
    "top_caption",
    "alt_text",
    "alttext",
    "raw_caption",
    "description",
    "title",
)
UID_NAMES = ("uid",)
HASH_NAMES = ("sha256", "md5")
# Carried under one name whatever the list calls them: every export keeps them.
ATTRIBUTION = {
    "license": ("license", "licence", "license_name", "license_url", "rights"),
    "author": ("author", "creator", "author_name", "photographer", "owner_name", "attribution"),
    "source_url": ("source_url", "page_url", "landing_url", "foreign_landing_url", "permalink"),
}
_TYPES = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
_HEX = re.compile(r"[0-9a-f]+\Z")
_TRUE, _FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})


@dataclass(frozen=True)
class Carried:
    """A column of the list that is carried along: its name there, and what it is in the dataset."""

    source: str
    field: pa.Field


@dataclass(frozen=True)
class Columns:
    """Which column of a list is what; None where it has none."""

    url: str
    caption: str | None
    uid: str | None
    expected_hash: str | None
    carried: tuple[Carried, ...]

    @property
    def schema(self) -> pa.Schema:
        return input_schema(c.field for c in self.carried)

    @property
    def renamed(self) -> dict[str, str]:
        """Carried column -> its name in the list, where they differ."""
        return {c.field.name: c.source for c in self.carried if c.field.name != c.source}


def find_columns(batch: Batch, config: ListConfig, where: str) -> Columns:
    """Names from `config`, else by the conventions of the public lists; types of the carried ones from this batch.

    Raises PairmillError: a name that the list does not have, or no column that looks like URLs.
    """
    names = list(batch.columns)
    url = _pick(names, config.url, URL_NAMES, "url", where)
    if url is None:
        raise PairmillError(
            f"{where} has no column of URLs that I know ({', '.join(URL_NAMES)}). It has: {', '.join(names)}. "
            "Pass --url NAME."
        )
    roles = [
        url,
        _pick(names, config.caption, CAPTION_NAMES, "caption", where, url),
        _pick(names, config.uid, UID_NAMES, "uid", where),
        _pick(names, config.sha256, HASH_NAMES, "sha256", where),
    ]
    types = config.types()
    for name in types:
        if name not in names:
            raise _unknown(name, "column-types", names, where)
    rest = [name for name in names if name not in roles]
    carried = tuple(_carried(rest, batch, types))
    return Columns(url, roles[1], roles[2], roles[3], carried)


def _pick(
    names: Sequence[str], given: str | None, known: Iterable[str], flag: str, where: str, taken: str | None = None
) -> str | None:
    if given is not None:
        if given in names:
            return given
        if given == NO_COLUMN and flag != "url":
            return None
        raise _unknown(given, flag, names, where)
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.strip().lower(), name)
    found = (name if name in names else lower.get(name) for name in known)
    return next((name for name in found if name is not None and name != taken), None)


def _unknown(name: str, flag: str, names: Sequence[str], where: str) -> PairmillError:
    near = suggest(name, names)
    return PairmillError(f"{where} has no column `{name}` (--{flag}).{near} It has: {', '.join(names)}.")


def _carried(names: Sequence[str], batch: Batch, types: dict[str, str]) -> list[Carried]:
    standard = {}
    for target, usual in ATTRIBUTION.items():
        found = _pick(names, None, usual, target, "")
        if found is not None and (target == found or target not in names):
            standard[found] = target
    out, seen = [], set()
    for name in names:
        target = carried_name(standard.get(name, name))
        while target in seen:
            target = f"{target}_2"
        seen.add(target)
        kind = _TYPES[types[name]] if name in types else _kind(batch.columns[name])
        out.append(Carried(name, pa.field(target, kind)))
    return out


def _kind(values: Values) -> pa.DataType:
    """The type under which a column is carried; nested values of JSON become their JSON text."""
    if isinstance(values, pa.Array):
        return _plain_type(values.type)
    kinds = {type(v) for v in values if v is not None}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int} and all(-(2**63) <= v < 2**63 for v in values if v is not None):
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_timestamp(kind) and kind.unit == "ns":  # Python's own times stop at microseconds
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind):
        return pa.time64("us")
    return pa.duration("us") if pa.types.is_duration(kind) else kind


def recarried(columns: Columns, schema: pa.Schema) -> Columns:
    """The columns with the carried fields of a dataset that stands (`--extend`), matched by name."""
    sources = {c.field.name: c.source for c in columns.carried}
    return replace(columns, carried=tuple(Carried(sources.get(f.name, f.name), f) for f in carried_fields(schema)))


def shape(batch: Batch, columns: Columns, where: str) -> pa.Table:
    """The batch as rows of `input/`; a carried column that this file lacks is null.

    Raises PairmillError where a carried value does not fit its type.
    """
    urls = [
        _none_if_empty(u.strip()) if u is not None else None for u in _texts(batch.columns.get(columns.url), batch.rows)
    ]
    captions, lists = _captions(batch, columns.caption)
    given = _texts(batch.columns.get(columns.uid or ""), batch.rows)
    pairs = [
        (pair_uid(url, caption), None) if uid is None or not uid.strip() else given_uid(uid.strip())
        for url, caption, uid in zip(urls, captions, given, strict=True)
    ]
    ours = {
        "uid": pa.array([p[0] for p in pairs], UID),
        "input_uid": pa.array([p[1] for p in pairs], pa.string()),
        "url": pa.array(urls, pa.string()),
        "caption": pa.array(captions, pa.string()),
        "captions": pa.array(lists, pa.list_(pa.string())),
        "expected_hash": pa.array(_hashes(batch, columns.expected_hash), pa.string()),
    }
    rest = [_column(batch.columns.get(c.source), c, batch.rows, where) for c in columns.carried]
    return pa.Table.from_arrays([*(ours[f.name] for f in INPUT_FIELDS), *rest], schema=columns.schema)


def _captions(batch: Batch, name: str | None) -> tuple[list[str | None], list[list[str] | None]]:
    values = None if name is None else batch.columns.get(name)
    if values is None:
        return [None] * batch.rows, [None] * batch.rows
    if isinstance(values, pa.Array) and not _is_list(values.type):
        return [_none_if_empty(t) for t in _texts(values, batch.rows)], [None] * batch.rows
    first, several = [], []
    for value in values.to_pylist() if isinstance(values, pa.Array) else values:
        texts = [t for t in map(text_of, value) if t] if isinstance(value, list) else None
        several.append(texts)
        first.append((texts[0] if texts else None) if texts is not None else _none_if_empty(text_of(value)))
    return first, several


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _none_if_empty(text: str | None) -> str | None:
    return text or None


def _texts(values: Values | None, rows: int) -> list[str | None]:
    if values is None:
        return [None] * rows
    if not isinstance(values, pa.Array):
        return [text_of(v) for v in values]
    array: Any = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    try:
        plain = array.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check what it calls a string
        plain = array.cast(pa.large_binary()).to_pylist()
        return [text_of(v) for v in plain]
    return plain if pa.types.is_string(array.type) else [text_of(v) for v in plain]


def text_of(value: Any) -> str | None:
    """A cell as text that UTF-8 can hold: None for null and NaN, bytes decoded, numbers written out."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return legacy_text(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may hold one half of a surrogate pair
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _hashes(batch: Batch, name: str | None) -> list[str | None]:
    return [_expected(text) for text in _texts(None if name is None else batch.columns.get(name), batch.rows)]


def _expected(text: str | None) -> str | None:
    """`sha256:HEX` or `md5:HEX` by the digest's length, None for anything else."""
    digest = (text or "").strip().lower()
    kind = {64: "sha256", 32: "md5"}.get(len(digest))
    return f"{kind}:{digest}" if kind and _HEX.match(digest) else None


def _column(values: Values | None, carried: Carried, rows: int, where: str) -> pa.Array:
    kind = carried.field.type
    if values is None:
        return pa.nulls(rows, kind)
    try:
        if isinstance(values, pa.Array):
            return _cast(values, kind)
        return pa.array([_value(v, kind) for v in values], kind)
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        ValueError,
        OverflowError,
        TypeError,
    ) as error:
        found = f"{values.type} there" if isinstance(values, pa.Array) else f"another value there ({error})"
        raise PairmillError(
            f"{where}: column `{carried.source}` is {kind} by the first rows of the first list, {found}. "
            f"Nothing is guessed: make the lists agree, or pass --column-types {carried.source}=string."
        ) from None


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_string(kind):
        if pa.types.is_nested(values.type) or pa.types.is_binary(values.type):
            return pa.array([text_of(v) for v in values.to_pylist()], kind)
        texts = values.cast(kind)
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid:
            return pa.array([text_of(v) for v in texts.cast(pa.large_binary()).to_pylist()], kind)
        return texts
    return values.cast(kind, safe=not pa.types.is_temporal(kind))


def _value(value: Any, kind: pa.DataType) -> Any:
    """A cell of csv or JSON as `kind`. Raises ValueError where it is none."""
    if value is None or (value == "" and not pa.types.is_string(kind)):
        return None
    if pa.types.is_string(kind):
        return text_of(value)
    if pa.types.is_boolean(kind):
        word = str(value).strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(f"{value!r} is no bool")
        return word in _TRUE
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_integer(kind):
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{value!r} is no integer")
        return int(value)
    return value
