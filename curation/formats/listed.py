"""What the formats share that list images by name: text out of a list, images below a folder, one list file written.

Written: `images/NNNNN/`, and one list of them all, made when every image stands; until then its parts lie in
`part-NNNNN`. What a format has no place for (url, ids, hashes, carried columns) is in each entry's `pairmill`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, TextIO, cast

import fsspec
from fsspec.compression import compr
from fsspec.utils import infer_compression

from curation.formats.samples import (
    SUFFIX_OF,
    Sample,
    Source,
    describe,
    find_files,
    pair_values,
    restore,
    safe_name,
    to_json,
)
from curation.formats.webdataset import sample_key
from curation.list_text import OddBytes, open_text
from curation.maintenance_config import ImagesImportConfig, ImportConfig
from schemas.errors import PairmillError
from shards.files import Folder

OURS = "pairmill"  # key or column of what `pair_values` tells of a row
MAX_CAPTIONS = 10_000  # entries of one image that become one pair
_PACKED = (".gz", ".zip", ".bz2", ".xz")
# What opening a name says that is none, or not that of a file.
_NO_FILE = frozenset({errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL})


def find_lists(paths: Sequence[str], suffixes: tuple[str, ...], what: str) -> list[Source]:
    """Lists among `paths`, packed (.gz, .zip) or not, no hidden ones. Raises PairmillError where there is none."""

    def wanted(name: str) -> bool:
        return _plain(name).endswith(suffixes) and not any(part.startswith(".") for part in name.split("/"))

    return find_files(paths, wanted, what)


def _plain(name: str) -> str:
    """The name in lower case, without the ending of its packing."""
    low = name.lower()
    return next((low.removesuffix(p) for p in _PACKED if low.endswith(p)), low)


@contextlib.contextmanager
def opened(source: Source) -> Iterator[TextIO]:
    """The list as text, unpacked on the way. Raises PairmillError where the packing is damaged."""
    try:
        with open_text(partial(_unpacked, source), None, OddBytes(), source.url) as text:
            yield text
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise PairmillError(f"{source.url} is damaged: {error}. Fetch it again.") from None


@contextlib.contextmanager
def _unpacked(source: Source) -> Iterator[BinaryIO]:
    kind = infer_compression(source.url)
    with source.open() as raw, contextlib.ExitStack() as stack:
        plain = stack.enter_context(compr[kind](raw, mode="rb")) if kind else raw
        yield io.BufferedReader(cast(Any, plain), 1 << 20)


class Images:
    """Images by name, below the folders that the configuration names, else below the list's own folder and `usual`.

    The folders are tried in order, so that which file is taken follows from the names alone.
    """

    def __init__(self, source: Source, config: ImportConfig, usual: Sequence[str] = ()) -> None:
        given = config.images if isinstance(config, ImagesImportConfig) else ()
        home = source.url.rsplit("/", 1)[0]
        self.source, self.most = source, config.max_bytes
        self.roots = [_Root(root) for root in given or (home, *(f"{home}/{name}" for name in usual))]

    def __call__(self, name: str) -> Callable[[], bytes]:
        """What loads the image; it raises FileNotFoundError where no folder has it.

        Raises PairmillError for a name that leaves its folder: `..`, a URL, an absolute one that is in none of them.
        """
        for root in self.roots:
            if name.startswith(root.path + "/"):
                name = name.removeprefix(root.path + "/")
                break
        return partial(self._load, safe_name(name, self.source.url))

    def _load(self, name: str) -> bytes:
        for root in self.roots:
            with contextlib.suppress(FileNotFoundError):
                return root.load(name, self.most)
        raise FileNotFoundError(name)


class _Root:
    def __init__(self, url: str) -> None:
        self.fs, path = fsspec.core.url_to_fs(url)
        self.path = path.rstrip("/")

    def load(self, name: str, most: int) -> bytes:
        try:
            with self.fs.open(f"{self.path}/{name}", "rb") as stream:
                return stream.read(most + 1)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno in _NO_FILE:
                raise FileNotFoundError(name) from None
            raise


def sample_of(
    images: Images, where: str, name: Any, record: Mapping[str, Any], values: dict[str, Any], config: ImportConfig
) -> Sample:
    """A sample of an entry `record`. `values`: captions, ids and columns as an entry of others tells them.

    An entry without an image's name is a text; one whose name is no text is `missing_file`.
    """
    sample = Sample(f"{where}: {str(name)[:200]}", None)
    if isinstance(name, str) and name:
        sample.image = images(name)
    elif name is not None:
        sample.status, sample.error = "missing_file", f"missing_file: {where}: its image is no name"
    ours = record.get(OURS)
    if not isinstance(ours, dict):
        return describe(sample, values, config)
    told = ours if "captions" in ours or "caption" in ours else values  # what the format cannot tell: none, line ends
    captions = told.get("captions") or told.get("caption")
    texts = captions if isinstance(captions, list) else [captions]
    return restore(sample, ours, [text for text in texts if isinstance(text, str)])


def joined(entries: Iterable[tuple[Any, Sample]]) -> Iterator[Sample]:
    """Entries (image, sample) that follow each other, name one image and differ in their captions alone, as one."""
    held: Sample | None = None
    last: Any = None
    for name, sample in entries:
        if (
            held is not None
            and name is not None
            and name == last
            and _same(held, sample)
            and len(held.captions) < MAX_CAPTIONS
        ):
            held.captions = [*held.captions, *sample.captions]
            continue
        if held is not None:
            yield held
        held, last = sample, name
    if held is not None:
        yield held


def _same(one: Sample, other: Sample) -> bool:
    names = ("url", "uid", "input_uid", "status", "sha256", "original", "carried")
    return bool(other.captions) and all(getattr(one, n) == getattr(other, n) for n in names)


def own_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """`pair_values` without captions, which the format itself tells; a caption that is null is told."""
    values = pair_values(row)
    caption = values.pop("caption", None)
    values.pop("captions", None)
    return values if caption is not None else {**values, "caption": None}


def captions_in(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row of pairs."""
    return row["captions"] or ([] if row["caption"] is None else [row["caption"]])


class ListWriter:
    """Writes images, and one list of them when all stand. A format says `index` and `text`."""

    index: str

    def text(self, lines: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[str]:
        """The list, in pieces. `lines()`: every pair in order as `line`'s dict; it may be called several times."""
        raise NotImplementedError

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What is kept of a row until the list is written."""
        return {"captions": captions_in(row), "values": own_values(row), "size": [row["width"], row["height"]]}

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(self.index) or folder.exists(_part(number))

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """`images/NNNNN/`, then the part that tells of them."""
        inside = f"images/{number:05d}"
        for name in folder.left_over(inside):
            folder.remove(f"{inside}/{name}")
        with folder.write(_part(number)) as stream:
            for index, row in enumerate(rows):
                key = sample_key(number, index)
                name = f"{inside}/{key}.{SUFFIX_OF.get(row['format'], row['format'])}"
                folder.write_bytes(name, row["image"])
                stream.write(to_json({"key": key, "image": name, **self.line(row)}) + b"\n")

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        """The list out of its parts, which are then gone."""
        if not folder.exists(self.index):
            with folder.write(self.index) as stream:
                for piece in self.text(partial(_lines, folder, len(sizes))):
                    stream.write(piece.encode())
        for number in range(len(sizes)):
            if folder.exists(_part(number)):
                folder.remove(_part(number))


def json_list(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A JSON array, an entry a line."""
    yield "["
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + json.dumps(entry, ensure_ascii=False)
    yield "\n]"


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _lines(folder: Folder, parts: int) -> Iterator[dict[str, Any]]:
    for number in range(parts):
        with folder.open(_part(number)) as stream:
            for line in stream:
                yield json.loads(line)
