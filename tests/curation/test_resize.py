"""What is stored for the bytes that were received: sizes by mode, kept bytes, refusals."""

import hashlib
import io

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from curation.config import DownloadConfig
from curation.resize import plan, process, resample
from shards.images import ImageError, decode_rgb
from tests.pictures import exif_block, photograph, psnr, saved, smooth

PICTURE = photograph(640, 480, 5)
JPEG = saved(Image.fromarray(PICTURE), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("mode", "size", "upscale", "expected"),
    [
        ("keep-ratio", 240, False, (320, 240)),
        ("keep-ratio", 900, False, (640, 480)),
        ("keep-ratio", 960, True, (1280, 960)),
        ("keep-ratio-largest", 320, False, (320, 240)),
        ("center-crop", 240, False, (240, 240)),
        ("center-crop", 600, False, (600, 480)),
        ("center-crop", 600, True, (600, 600)),
        ("border", 320, False, (320, 320)),
        ("border", 800, False, (800, 800)),
        ("none", 100, False, (640, 480)),
    ],
)
def test_size_by_mode(mode, size, upscale, expected):
    stored = process(JPEG, DownloadConfig(resize=mode, size=size, upscale=upscale))
    assert (stored.width, stored.height) == expected
    assert (stored.original_width, stored.original_height) == (640, 480)
    assert decode_rgb(stored.image).shape == (expected[1], expected[0], 3)
    assert stored.sha256 == hashlib.sha256(JPEG).digest()
    assert stored.stored_sha256 == hashlib.sha256(stored.image).digest()


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 1000),
    st.sampled_from(["keep-ratio", "keep-ratio-largest", "center-crop", "border"]),
)
def test_nothing_grows_unless_asked(width, height, size, mode):
    steps = plan(width, height, DownloadConfig(resize=mode, size=size))
    assert 1 <= steps.scaled_width <= width
    assert 1 <= steps.scaled_height <= height
    grown = plan(width, height, DownloadConfig(resize=mode, size=size, upscale=True))
    side = min if mode in ("keep-ratio", "center-crop") else max
    assert side(grown.scaled_width, grown.scaled_height) == size


def test_crop_and_border_are_centred():
    cropped = decode_rgb(process(JPEG, DownloadConfig(resize="center-crop", size=480, encode="png")).image)
    assert np.array_equal(cropped, decode_rgb(JPEG)[:, 80:560])
    bordered = decode_rgb(process(JPEG, DownloadConfig(resize="border", size=640, encode="png")).image)
    assert np.array_equal(bordered[80:560], decode_rgb(JPEG))
    assert (bordered[:80] == 255).all()
    assert (bordered[560:] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("encode", ["jpeg", "png", "webp"])
def test_bytes_are_kept_where_nothing_changed(kind, encode):
    data = saved(Image.fromarray(smooth()), kind)
    stored = process(data, DownloadConfig(encode=encode))
    assert stored.image == data
    assert stored.format == kind.lower()
    assert stored.sha256 == stored.stored_sha256


def changed_by() -> dict[str, bytes]:
    picture = Image.fromarray(smooth())
    alpha = Image.fromarray(np.dstack([smooth(), np.full((40, 60), 9, np.uint8)]))
    broken = JPEG[:2] + b"\xff\xe1\x00\x0aExif\0\0II" + JPEG[2:]
    return {
        "orientation": saved(picture, "JPEG", exif=exif_block(3)),
        "alpha": saved(alpha, "PNG"),
        "cmyk": saved(picture.convert("CMYK"), "JPEG"),
        "gif": saved(picture, "GIF"),
        "bmp": saved(picture, "BMP"),
        "animation": saved(picture, "WEBP", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
        "broken metadata": broken,
    }


@pytest.mark.parametrize("why", list(changed_by()))
def test_bytes_are_recoded_where_something_changed(why):
    data = changed_by()[why]
    stored = process(data, DownloadConfig(size=2000))
    assert stored.format == "jpeg"
    assert stored.image != data
    assert np.abs(decode_rgb(stored.image).astype(int) - decode_rgb(data)).mean() < 5
    assert decode_rgb(stored.image).shape == (stored.height, stored.width, 3)


def test_none_keeps_bytes_of_every_kind_and_counts_pixels_as_readers_see_them():
    lying = saved(Image.fromarray(smooth()), "JPEG", exif=exif_block(6))
    stored = process(lying, DownloadConfig(resize="none"))
    assert stored.image == lying
    assert (stored.width, stored.height) == (40, 60)
    gif = saved(Image.fromarray(smooth()), "GIF")
    assert process(gif, DownloadConfig(resize="none")).format == "gif"
    with pytest.raises(ImageError, match="decode_error"):
        process(JPEG[:-500], DownloadConfig(resize="none"))


def test_expected_hash():
    for name in ("sha256", "md5"):
        digest = hashlib.new(name, JPEG).hexdigest()
        assert process(JPEG, DownloadConfig(), f"{name}:{digest.upper()}").width == 512
        with pytest.raises(ImageError, match="hash_mismatch"):
            process(JPEG + b"x", DownloadConfig(), f"{name}:{digest}")


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"min_side": 481}, "too_small"),
        ({"max_aspect": 1.3}, "bad_aspect"),
        ({"max_pixels": 640 * 480 - 1}, "bomb"),
        ({"size": 3000, "upscale": True, "max_pixels": 2_000_000}, "bomb"),
    ],
)
def test_refusals(options, status):
    with pytest.raises(ImageError) as caught:
        process(JPEG, DownloadConfig(**options))
    assert caught.value.status == status


def test_limits_are_inclusive():
    assert process(JPEG, DownloadConfig(min_side=480, max_aspect=640 / 480, max_pixels=640 * 480)).width == 512


@pytest.mark.parametrize("size", [(320, 240), (512, 384), (400, 300), (256, 192), (205, 154), (100, 75)])
def test_resample_is_an_area_filter(size):
    ours = resample(PICTURE, *size)
    area = cv2.resize(PICTURE, size, interpolation=cv2.INTER_AREA)
    assert psnr(ours, area) > 40
    assert abs(ours.mean() - PICTURE.mean()) < 0.5


def test_resample_by_two_and_four_is_the_plain_mean():
    for factor in (2, 4):
        blocks = PICTURE.reshape(480 // factor, factor, 640 // factor, factor, 3).mean((1, 3))
        assert np.abs(resample(PICTURE, 640 // factor, 480 // factor) - blocks).max() <= 1.5


def test_resample_up_is_lanczos():
    expected = cv2.resize(PICTURE, (800, 600), interpolation=cv2.INTER_LANCZOS4)
    assert np.array_equal(resample(PICTURE, 800, 600), expected)


def test_same_bytes_every_time():
    data = saved(Image.fromarray(photograph(1024, 768, 2)), "JPEG")
    assert process(data, DownloadConfig()) == process(bytes(bytearray(data)), DownloadConfig())
    out = Image.open(io.BytesIO(process(data, DownloadConfig()).image))
    assert (out.format, out.info.get("exif"), out.info.get("icc_profile")) == ("JPEG", None, None)


@pytest.mark.parametrize(
    "wrong", [{"quality": 0}, {"contact": "a\r\nHost: b"}, {"allow_private": ("http://x/",)}, {"max_aspect": 0.5}]
)
def test_configuration_refuses(wrong):
    with pytest.raises(ValidationError):
        DownloadConfig(**wrong)
