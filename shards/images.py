"""Bytes <-> RGB: the one decoder and the one encoder.

Plain JPEGs (8 bits, grey or three components) go through OpenCV, everything else through Pillow;
both use libjpeg-turbo and give equal pixels. Every image comes out as a viewer would show it: upright, in sRGB,
8 bits, on white, the first frame of an animation.

**The DCT rule.** A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much cheaper. Measured on 27
photographs (11 sizes from 640x480 to 2400x1800, resized to shorter sides of 384 and 256 px, against full decoding),
a factor is used when
- it divides both sides (an odd side shifts the samples: a tenth of the photographs fell to 36 dB), and
- what it leaves is at least 1.5 (1/2), 1.75 (1/4) or 2 (1/8) times the size wanted, or exactly that size.
Nine photographs in ten then stay above 40 dB (median 45 to 55 dB).
Statistics do not need that: with `at_least` any factor is used that leaves the shorter side so many pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from shards.colour import needs_conversion, profiled, to_rgb
from shards.headers import HeaderError, JpegHeader, read_jpeg, read_size, sniff, without_metadata

__all__ = ["MAX_PIXELS", "Decoded", "Header", "ImageError", "decode", "decode_rgb", "encode", "header", "sniff"]

MAX_PIXELS = 64 * 1024 * 1024
PLAIN_KINDS = frozenset({"jpeg", "png", "webp"})
_FACTORS = ((8, 2.0), (4, 1.75), (2, 1.5))
_CV2_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# OpenCV's own pool under many workers fights for the same cores.
cv2.setNumThreads(1)
# Our own bound is lower than Pillow's and raises; its warning would only reach people who cannot act on it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Broken metadata is a stranger's and never fails an image; nobody needs a line about it on stderr.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(Exception):
    """Bytes that are no usable image. `status` is one of schemas.status, `detail` a short reason."""

    def __init__(self, status: str, detail: str):
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


@dataclass(frozen=True)
class Header:
    """Kind by magic bytes; width and height in px as stored; a JPEG's EXIF orientation (other kinds tell later)."""

    kind: str
    width: int
    height: int
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return _turned(self.width, self.height, self.orientation)


@dataclass(frozen=True)
class Decoded:
    """Pixels and where they come from.

    rgb            uint8 [H, W, 3], smaller than `width` x `height` when a reduced DCT scale was allowed
    width, height  of the whole image, upright, px
    plain          a decoder that knows nothing of orientation, profiles, alpha or frames shows the same
    """

    rgb: np.ndarray
    kind: str
    width: int
    height: int
    plain: bool


def header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Kind and size without decoding a pixel.

    Raises ImageError: not_image (empty, HTML, SVG, unknown), decode_error (a broken header), bomb (more than
    `max_pixels`).
    """
    return _header(data, max_pixels)[0]


def decode_rgb(data: bytes, *, shrink_to: tuple[int, int] | None = None, at_least: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3] sRGB. With `shrink_to` (width, height of the upright result wanted) or `at_least` (px of the
    shorter side) a JPEG may come out smaller than it is, by the rule above, but never smaller than that.

    Raises ImageError: not_image, decode_error, bomb.
    """
    return decode(data, shrink_to=shrink_to, at_least=at_least).rgb


def decode(
    data: bytes,
    *,
    shrink_to: tuple[int, int] | None = None,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """Like `decode_rgb`, with what is known about the image beside the pixels."""
    head, jpeg = _header(data, max_pixels)
    if jpeg is not None:
        decoded = _decode_plain_jpeg(data, jpeg, _reduction(jpeg, shrink_to, at_least))
        if decoded is not None:
            return decoded
    try:
        return _decode_pillow(data, head.kind, jpeg, max_pixels)
    except ImageError as error:
        # A decoder may trip over broken text, EXIF or profile chunks of a good image.
        bare = without_metadata(data, head.kind) if error.status == "decode_error" else None
        if bare is None:
            raise
    good = _decode_pillow(bare, head.kind, jpeg, max_pixels)
    return Decoded(good.rgb, good.kind, good.width, good.height, plain=False)


def encode(rgb: np.ndarray, kind: str, quality: int = 90) -> bytes:
    """uint8 [H, W, 3] -> bytes of a jpeg, png or webp without metadata. Equal pixels give equal bytes.

    quality  1 to 100, of jpeg and webp; png is lossless and ignores it.
    """
    options = {
        "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality]),
        "png": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 6]),
        "webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, quality]),
    }
    if kind not in options:
        raise ValueError(f"`kind` must be jpeg, png or webp, got {kind!r}")
    extension, parameters = options[kind]
    done, out = cv2.imencode(extension, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), parameters)
    if not done:
        raise ValueError(f"cannot encode {rgb.shape[1]} x {rgb.shape[0]} px as {kind}")
    return out.tobytes()


def _header(data: bytes, max_pixels: int) -> tuple[Header, JpegHeader | None]:
    kind = sniff(data)
    if kind is None:
        raise ImageError("not_image", _what_instead(data))
    jpeg = None
    try:
        if kind == "jpeg":
            jpeg = read_jpeg(data)
            width, height = jpeg.width, jpeg.height
        elif kind in ("tiff", "avif"):
            width, height = _open(data, kind, max_pixels).size
        else:
            width, height = read_size(data, kind)
    except HeaderError as error:
        raise ImageError("decode_error", f"{kind}: {error}") from None
    _check_size(kind, width, height, max_pixels)
    return Header(kind, width, height, jpeg.orientation if jpeg else 1), jpeg


def _what_instead(data: bytes) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "empty"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML"
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "SVG"
    return "unknown kind"


def _check_size(kind: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("bomb", f"{kind}: {width} x {height} px, at most {max_pixels} px are decoded")
    if width < 1 or height < 1:
        raise ImageError("decode_error", f"{kind}: {width} x {height} px")


def _decode_plain_jpeg(data: bytes, jpeg: JpegHeader, factor: int) -> Decoded | None:
    """Through OpenCV, at 1/factor; None where the JPEG is not plain or OpenCV does not like it."""
    foreign = needs_conversion(jpeg.icc)
    if jpeg.components not in ((3,) if foreign else (1, 3)) or jpeg.precision != 8:
        return None
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), _CV2_FLAGS[factor] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if bgr is None:
        return None
    rgb, converted = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=bgr), False
    if foreign:  # after the reduction: a phone's picture has 12 MP and a Display P3 profile
        rgb, converted = profiled(Image.fromarray(rgb), jpeg.icc)
    rgb = _upright(rgb, jpeg.orientation)
    width, height = _turned(jpeg.width, jpeg.height, jpeg.orientation)
    plain = jpeg.orientation == 1 and not jpeg.broken_metadata and not converted
    return Decoded(rgb, "jpeg", width, height, plain)


def _reduction(jpeg: JpegHeader, shrink_to: tuple[int, int] | None, at_least: int | None) -> int:
    """1, 2, 4 or 8: by how much the decoder may reduce, by the rule on top of this module."""
    if at_least is not None:
        return next((f for f, _ in _FACTORS if min(jpeg.width, jpeg.height) // f >= at_least), 1)
    if shrink_to is None:
        return 1
    want_w, want_h = _turned(*shrink_to, jpeg.orientation)
    for factor, margin in _FACTORS:
        if jpeg.width % factor or jpeg.height % factor:
            continue
        left = jpeg.width // factor, jpeg.height // factor
        if left == (want_w, want_h) or (left[0] >= margin * want_w and left[1] >= margin * want_h):
            return factor
    return 1


def _open(data: bytes, kind: str, max_pixels: int) -> Image.Image:
    """Pillow's lazy image, its size checked once more (a GIF's frame may be larger than its screen)."""
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except Image.DecompressionBombError:
        raise ImageError("bomb", f"{kind}: at most {max_pixels} px are decoded") from None
    except Exception as error:  # each of Pillow's plugins raises what it likes on hostile bytes
        raise ImageError("decode_error", f"{kind}: {type(error).__name__}") from None
    width, height = image.size
    _check_size(kind, width, height, max_pixels)
    return image


def _decode_pillow(data: bytes, kind: str, jpeg: JpegHeader | None, max_pixels: int) -> Decoded:
    image = _open(data, kind, max_pixels)
    animated = bool(getattr(image, "is_animated", False))
    try:
        image.load()
        icc = jpeg.icc if jpeg else image.info.get("icc_profile")
        rgb, plain = to_rgb(image, icc)
    except Exception as error:  # as above
        raise ImageError("decode_error", f"{kind}: {type(error).__name__}: {_words(error)}") from None
    orientation = jpeg.orientation if jpeg else _pillow_orientation(image)
    deep = kind == "png" and data[24] == 16
    plain = plain and kind in PLAIN_KINDS and orientation == 1 and not animated and not deep
    if jpeg is not None:
        plain = plain and not jpeg.broken_metadata
    rgb = _upright(rgb, orientation)
    return Decoded(rgb, kind, rgb.shape[1], rgb.shape[0], plain)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _pillow_orientation(image: Image.Image) -> int:
    """From EXIF or XMP, read after loading: Pillow's TIFF and AVIF readers may have turned the pixels already."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata never fails a good image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as EXIF orientation 1 to 8 wants them shown."""
    if orientation == 1:
        return rgb
    if orientation in (5, 6, 7, 8):
        rgb = cv2.transpose(rgb)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return rgb if flip is None else cv2.flip(rgb, flip)
