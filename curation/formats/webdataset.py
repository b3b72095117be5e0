"""WebDataset tars: in with several captions and any order of suffixes, out with reproducible bytes.

A member's key ends at the first dot of its base name; the rest, in lower case, is its suffix; members of a sample lie
together. Written: `NNNNN.tar` (one image, `txt` and `json` a sample, owner 0, time 0), `NNNNN.idx` (DALI's index),
`sizes.json` (open_clip's).
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from curation.formats.samples import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    SUFFIX_OF,
    Sample,
    Source,
    describe,
    find_files,
    pair_values,
    read_json,
    safe_name,
    to_json,
)
from curation.maintenance_config import ImportConfig
from schemas.errors import PairmillError
from shards.files import Folder

_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)\Z")
_TAR = re.compile(r".*\.(tar|tar\.gz|tgz)\Z", re.IGNORECASE)
Members = dict[str, tarfile.TarInfo]


def sources(paths: Sequence[str]) -> list[Source]:
    """Tars among `paths`; those of a folder sorted by name."""
    return find_files(paths, lambda name: bool(_TAR.match(name)), "tar (.tar, .tar.gz, .tgz)")


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """Samples tar after tar, in the order in which they lie there.

    Raises PairmillError: a damaged tar; a name that leaves its folder, a link or a device; a suffix twice in a sample.
    """
    for source in sources:
        yield from read_tar(source, config)


def read_tar(source: Source, config: ImportConfig) -> Iterator[Sample]:
    """Samples of one tar."""
    plain = source.name.lower().endswith(".tar")
    try:
        with source.open() as stream, tarfile.open(fileobj=stream, mode="r:" if plain else "r:gz") as tar:
            for key, members in groups(tar, source):
                sample = _sample(tar, source, key, members, config)
                if not plain and sample.image is not None:  # going back in a compressed file reads it all again
                    data = sample.image()
                    sample.image = partial(bytes, data)
                yield sample
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PairmillError(f"{source.url} is damaged: {error}. Take it out of the input, or fetch it again.") from None


def groups(tar: tarfile.TarFile, source: Source) -> Iterator[tuple[str, Members]]:
    key, members = "", Members()
    for member in tar:
        if member.isdir():
            continue
        where = f"{source.url}: {member.name}"
        if not member.isreg():
            raise PairmillError(f"{where} is a link or a device. Only plain files are taken.")
        found = _NAME.match(safe_name(member.name, source.url))
        if found is None or (found[1].startswith("__") and found[1].endswith("__")):
            continue
        name, suffix = found[1], found[2].lower()
        if name != key:
            if members:
                yield key, members
            key, members = name, Members()
        if suffix in members:
            raise PairmillError(f"{where}: the sample has two members with the suffix .{suffix}.")
        members[suffix] = member
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    if members:
        yield key, members


def _sample(tar: tarfile.TarFile, source: Source, key: str, members: Members, config: ImportConfig) -> Sample:
    where = f"{source.name}: {key}"
    image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
    sample = Sample(where, None if image is None else partial(load, tar, image, config.max_bytes))
    values: dict[str, Any] = {}
    if "txt" in members:
        text = load(tar, members["txt"], MAX_TEXT_BYTES).decode("utf-8-sig", "replace")
        values["txt"] = text or None
    if "json" in members:
        try:
            values |= read_json(load(tar, members["json"], MAX_TEXT_BYTES))
        except ValueError as error:
            sample.error = f"json: {error}"
    return describe(sample, values, config)


def load(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """The member's bytes, one more than `most` where it is longer."""
    stream = tar.extractfile(member)
    assert stream is not None, "only plain files are read"
    data = stream.read(min(member.size, most + 1))
    if len(data) < min(member.size, most + 1):
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


class Writer:
    """Writes samples as tars into a folder."""

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(f"{number:05d}.tar") and folder.exists(f"{number:05d}.idx")

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """`NNNNN.tar`, then its index. `rows` are rows of pairs."""
        lines = []
        with folder.write(f"{number:05d}.tar") as stream:
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for index, row in enumerate(rows):
                    lines.append(_add_sample(tar, sample_key(number, index), row))
        text = "".join(line + "\n" for line in (f"v1.2 {len(lines)}", *lines))
        folder.write_bytes(f"{number:05d}.idx", text.encode())

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        names = {f"{number:05d}.tar": size for number, size in enumerate(sizes)}
        folder.write_bytes("sizes.json", (json.dumps(names, indent=1) + "\n").encode())


def sample_key(number: int, index: int) -> str:
    """Digits only, sorted as the rows are: HF and img2dataset keys look like this."""
    return f"{number:05d}{index:05d}"


def _add_sample(tar: tarfile.TarFile, key: str, row: Mapping[str, Any]) -> str:
    """Adds image, txt and json; the sample's line of the index: suffix, offset, size, name of each."""
    parts = {
        SUFFIX_OF.get(row["format"], row["format"]): row["image"],
        "json": to_json(pair_values(row)),
        "txt": (row["caption"] or "").encode(),
    }
    words = []
    for suffix, data in parts.items():
        offset = add_member(tar, f"{key}.{suffix}", data)
        words.append(f"{suffix} {offset} {len(data)} {key}.{suffix}")
    return " ".join(words)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a file that looks the same whoever writes it whenever; the offset of its bytes in the tar."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset
