"""What every format shares: a sample on its way in, a pair as JSON on its way out, files by glob."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec

from curation.maintenance_config import ImportConfig
from schemas.errors import PairmillError
from schemas.pairs import RESERVED
from shards.files import is_temporary

# Suffix -> kind, the likeliest first. The kind of a pair is decided by its bytes.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
SUFFIX_OF = {"jpeg": "jpg", "tiff": "tif"}
CAPTION_KEYS = ("captions", "caption", "txt", "text")
MAX_TEXT_BYTES = 16 << 20
# Keys of a sample's JSON that become columns of ours; `key`, `status` and `error_message` are img2dataset's.
_OURS = RESERVED | {"key", "status", "error_message"}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass
class Sample:
    """One pair as a format tells it. `image` loads the bytes when the engine asks; None: there is none.

    `status` None: the engine decides from the bytes. `where` says which file and member, for errors.
    """

    where: str
    image: Callable[[], bytes] | None
    captions: list[str] = field(default_factory=list)
    url: str | None = None
    uid: str | None = None
    input_uid: str | None = None
    status: str | None = None
    error: str | None = None
    http_status: int | None = None
    sha256: bytes | None = None
    original: tuple[int | None, int | None] = (None, None)
    carried: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A file of the input: its URL, its name below what the user gave, and its size."""

    url: str
    name: str
    bytes: int

    def open(self) -> BinaryIO:
        return fsspec.open(self.url, "rb").open()


def find_files(paths: Sequence[str], wanted: Callable[[str], bool], what: str) -> list[Source]:
    """Files, folders, globs, `{00000..00009}` and fsspec URLs, in the order given, those of a folder sorted.

    Raises PairmillError where a path has no such file.
    """
    out: list[Source] = []
    for path in (one for text in paths for one in _expand(str(text))):
        found = list(_files(path, wanted))
        if not found:
            raise PairmillError(f"{path}: no {what} there.")
        out += found
    return out


def _expand(text: str) -> list[str]:
    """Every name of `{00000..00009}`, the numbers as wide as the first."""
    found = _BRACES.search(text)
    if found is None:
        return [text]
    first, last = found[1], found[2]
    names = (
        text[: found.start()] + str(n).zfill(len(first)) + text[found.end() :] for n in range(int(first), int(last) + 1)
    )
    return [one for name in names for one in _expand(name)]


def _files(path: str, wanted: Callable[[str], bool]) -> Iterator[Source]:
    fs, root = fsspec.core.url_to_fs(path)
    roots = sorted(fs.glob(root)) if glob.has_magic(root) else [root]
    for base in roots:
        if fs.isdir(base):
            names = sorted(fs.find(base))
        else:
            names = [base] if fs.exists(base) else []
        for name in names:
            short = PurePosixPath(name).relative_to(base).as_posix() if name != base else PurePosixPath(name).name
            if wanted(short) and not is_temporary(PurePosixPath(name).name):
                yield Source(fs.unstrip_protocol(name), short, int(fs.size(name)))


def clean(text: str) -> str:
    """The text as UTF-8 can hold it: lone surrogates (JSON allows them) become question marks."""
    return text.encode("utf-8", "replace").decode()


def read_json(data: bytes) -> dict[str, Any]:
    """The object in a sample's JSON. Raises ValueError where there is none."""
    value = json.loads(data.decode("utf-8-sig", "replace"))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def captions_of(values: Mapping[str, Any], config: ImportConfig) -> list[str]:
    """Captions under the configured keys, or under the first usual one that is there (null: no caption)."""
    if config.caption_key:
        return [text for key in config.caption_key for text in _texts(values.get(key))]
    for key in CAPTION_KEYS:
        if values.get(key) is not None or (key == "caption" and key in values):
            return _texts(values[key])
    return []


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [clean(value)]
    if isinstance(value, list):
        return [clean(v) for v in value if isinstance(v, str)]
    return [str(value)]


def describe(sample: Sample, values: Mapping[str, Any], config: ImportConfig) -> Sample:
    """Fills a sample from the values beside its image: captions, url, ids, hash, sizes, and the rest as carried."""
    sample.captions = captions_of(values, config)
    sample.url = _text(values.get("url"))
    sample.uid = _text(values.get(config.uid_key or "uid"))
    sample.input_uid = _text(values.get("input_uid"))
    sample.sha256 = _digest(values.get("sha256"))
    sample.original = (_side(values.get("original_width")), _side(values.get("original_height")))
    used = {*_OURS, *(config.caption_key or CAPTION_KEYS), config.uid_key or "uid"}
    sample.carried = {clean(k): v for k, v in values.items() if k not in used}
    return sample


def restore(sample: Sample, values: Mapping[str, Any], captions: list[str]) -> Sample:
    """Fills a sample from what `pair_values` gave: whatever is not ours is a carried column, whatever its name."""
    sample.captions = [clean(text) for text in captions]
    sample.url, sample.uid, sample.input_uid = (_text(values.get(name)) for name in ("url", "uid", "input_uid"))
    sample.sha256 = _digest(values.get("sha256"))
    sample.original = (_side(values.get("original_width")), _side(values.get("original_height")))
    sample.carried = {clean(k): v for k, v in values.items() if k not in RESERVED}
    return sample


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else clean(str(value))


def _side(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 2**31 else None


def _digest(value: Any) -> bytes | None:
    text = value if isinstance(value, str) else ""
    return bytes.fromhex(text) if re.fullmatch(r"[0-9a-fA-F]{64}", text) else None


def pair_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of pairs as JSON values: what `describe` reads back. Attribution and carried columns included."""
    out: dict[str, Any] = {"uid": row["uid"].hex(), "input_uid": row["input_uid"], "url": row["url"]}
    out["caption"] = row["caption"]
    if row["captions"] is not None:
        out["captions"] = row["captions"]
    sizes = ("width", "height", "original_width", "original_height")
    out |= {name: row[name] for name in sizes}
    out["sha256"] = row["sha256"].hex() if row["sha256"] else None
    out |= {name: _plain(value) for name, value in row.items() if name not in RESERVED}
    return {k: v for k, v in out.items() if v is not None or k == "caption"}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def to_json(values: Mapping[str, Any]) -> bytes:
    """Equal values give equal bytes. NaN, which JSON lacks, becomes null."""
    return json.dumps(_finite(values), ensure_ascii=False, sort_keys=True).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


def safe_name(name: str, where: str) -> str:
    """The name, if it stays inside its folder. Raises PairmillError for `..`, absolute names, URLs, backslashes."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "://" in name or "\\" in name or "\0" in name or not parts:
        raise PairmillError(f"{where}: refused the unsafe name {name!r}. Nothing of this file was taken.")
    return name
