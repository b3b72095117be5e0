"""What an image's first bytes say: its kind, size, orientation and colour profile, without decoding a pixel.

Written out here, rather than left to a decoder, because the size must be known before any decoder is trusted
with the bytes. TIFF and AVIF sizes are read by Pillow's lazy openers (`shards/images.py`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AVIF_BRANDS = (b"avif", b"avis")
# Start-of-frame markers: baseline, progressive and the rare ones. C4, C8 and CC are other things.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


class HeaderError(ValueError):
    """The bytes begin like an image of a known kind but their header is broken."""


def sniff(data: bytes) -> str | None:
    """Kind by magic bytes: jpeg, png, webp, gif, bmp, tiff or avif; None for HTML, SVG, anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in _TIFF_MAGIC:
        return "tiff"
    if data[4:8] == b"ftyp" and _avif_brand(data):
        return "avif"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "bmp"
    return None


def _avif_brand(data: bytes) -> bool:
    size = min(int.from_bytes(data[:4], "big"), 256)
    return any(data[i : i + 4] in _AVIF_BRANDS for i in range(8, size, 4))


@dataclass(frozen=True)
class JpegHeader:
    """What stands before a JPEG's first scan. Sizes are as stored, before `orientation` is applied."""

    width: int
    height: int
    components: int
    precision: int
    orientation: int = 1
    icc: bytes | None = None
    broken_metadata: bool = False


def read_jpeg(data: bytes) -> JpegHeader:
    """Walk the segments up to the first scan. Raises HeaderError where there is no frame header."""
    frame: tuple[int, int, int, int] | None = None
    orientation: int | None = None
    chunks: dict[int, bytes] = {}
    broken = False
    for marker, start, end in _segments(data):
        body = data[start:end]
        if marker in _SOF and frame is None and len(body) >= 6:
            precision, height, width, components = struct.unpack_from(">BHHB", body)
            frame = (width, height, components, precision)
        elif marker == 0xE1 and orientation is None and body[:6] == b"Exif\0\0":
            orientation = exif_orientation(body[6:])
            broken = broken or orientation is None
        elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0" and len(body) > 14:
            chunks[body[12]] = body[14:]
            broken = broken or body[12] == 0 or body[12] > body[13]
    if frame is None:
        raise HeaderError("no frame header")
    # Numbered from 1; a missing part makes the whole profile useless.
    whole = sorted(chunks) == list(range(1, len(chunks) + 1))
    icc = b"".join(chunks[i] for i in sorted(chunks)) if chunks and whole else None
    return JpegHeader(*frame, orientation=orientation or 1, icc=icc, broken_metadata=broken or not whole)


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end of its body) of each segment from SOI to the first SOS, both left out."""
    found, at, end = [], 2, len(data)
    while at + 4 <= end:
        if data[at] != 0xFF:
            at += 1  # stray bytes between segments: decoders skip them too
            continue
        marker = data[at + 1]
        if marker == 0xFF or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xDA, 0xD9):
            break
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            break
        found.append((marker, at + 4, at + 2 + length))
        at += 2 + length
    return found


def exif_orientation(exif: bytes) -> int | None:
    """Orientation 1 to 8 from an EXIF block (a TIFF structure); 1 where it has none, None where it is broken."""
    if len(exif) < 8 or exif[:4] not in _TIFF_MAGIC[:2]:
        return None
    order = "<" if exif[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", exif, 4)
    if at + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if entry + 12 > len(exif):
            return None
        tag, kind = struct.unpack_from(order + "HH", exif, entry)
        if tag == 0x0112:
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, entry + 8)
            return value if 1 <= value <= 8 else None
    return 1


def read_size(data: bytes, kind: str) -> tuple[int, int]:
    """(width, height) in px as stored, for png, gif, bmp and webp. Raises HeaderError for a short header."""
    try:
        return _SIZES[kind](data)
    except (struct.error, IndexError):
        raise HeaderError("the header is cut short") from None


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise HeaderError("no IHDR chunk")
    return struct.unpack_from(">II", data, 16)


def _gif_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:  # the OS/2 form
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return 1 + low_w + (high_w << 16), 1 + low_h + (high_h << 16)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise HeaderError("no VP8 chunk")


_SIZES = {"png": _png_size, "gif": _gif_size, "bmp": _bmp_size, "webp": _webp_size}


def without_metadata(data: bytes, kind: str) -> bytes | None:
    """The same pixels without what a decoder may trip over: text, EXIF, XMP, ICC. None for other kinds than
    jpeg and png, and where nothing could be taken out.
    """
    if kind == "jpeg":
        bare = _bare_jpeg(data)
    elif kind == "png":
        bare = _bare_png(data)
    else:
        return None
    return bare if len(bare) < len(data) else None


def _bare_jpeg(data: bytes) -> bytes:
    rest = 2
    kept = [b"\xff\xd8"]
    for marker, start, rest in _segments(data):
        # Adobe's APP14 says how the colours are stored; the other application segments are about the picture.
        adobe = marker == 0xEE and data[start : start + 5] == b"Adobe"
        if adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[start - 4 : rest])
    return b"".join(kept) + data[rest:]


def _bare_png(data: bytes) -> bytes:
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)
