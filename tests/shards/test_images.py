"""Every kind of image comes out as a viewer would show it, or as the status that says why not."""

import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from shards.headers import exif_orientation, without_metadata
from shards.images import ImageError, decode, decode_rgb, encode, header, sniff
from tests.pictures import exif_block, photograph, psnr, saved, smooth

RNG = np.random.default_rng(0)


def adobe_like_profile() -> bytes:
    """A profile that is plainly not sRGB: swapping its primaries' luminances would be seen at once."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    tags = {}
    for i in range(count):
        name, at, size = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        tags[name] = (at, size)
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    a = bytes(profile[red[0] : red[0] + red[1]])
    profile[red[0] : red[0] + red[1]] = profile[green[0] : green[0] + green[1]]
    profile[green[0] : green[0] + green[1]] = a
    return bytes(profile)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_every_kind_is_known_by_its_bytes_and_decodes(kind):
    picture = smooth()
    data = saved(Image.fromarray(picture), kind.upper(), **({"quality": 95} if kind in ("jpeg", "webp") else {}))
    assert sniff(data) == kind
    head = header(data)
    assert (head.kind, head.width, head.height) == (kind, 60, 40)
    decoded = decode(data)
    assert (decoded.width, decoded.height) == (60, 40)
    assert decoded.rgb.dtype == np.uint8
    assert np.abs(decoded.rgb.astype(int) - picture).mean() < (0.01 if kind in ("png", "bmp", "tiff") else 6)


def test_webp_lossless_and_extended_headers_give_their_size():
    assert header(saved(Image.fromarray(smooth()), "WEBP", lossless=True)).width == 60
    extended = saved(Image.fromarray(smooth()), "WEBP", exif=exif_block(6))
    assert (header(extended).width, header(extended).height) == (60, 40)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><p>gone</p>", "HTML"),
        (b"\n <HTML><body>", "HTML"),
        (b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"),
        (b"<svg width='1'/>", "SVG"),
        (b"%PDF-1.4 and so on", "unknown"),
        (b"BMW is a car, not a bitmap", "unknown"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, word):
    with pytest.raises(ImageError, match=word) as caught:
        decode_rgb(data)
    assert caught.value.status == "not_image"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = Image.fromarray(smooth())
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    lying = upright if undo is None else upright.transpose(undo)
    data = saved(lying, kind, exif=exif_block(orientation), **({} if kind == "TIFF" else {"quality": 95}))
    decoded = decode(data)
    assert (decoded.width, decoded.height) == (60, 40)
    assert np.abs(decoded.rgb.astype(int) - smooth()).mean() < 4
    assert decoded.plain == (orientation == 1 and kind != "TIFF")
    if kind == "JPEG":
        assert header(data).upright == (60, 40)


def test_reduced_decoding_respects_orientation():
    lying = Image.fromarray(smooth(640, 480)).transpose(Image.Transpose.ROTATE_90)
    decoded = decode(saved(lying, "JPEG", exif=exif_block(6)), shrink_to=(320, 200))
    assert (decoded.width, decoded.height) == (640, 480)
    assert decoded.rgb.shape == (480, 640, 3)  # half is 1.0 and 1.2 times the wish
    assert decode(saved(lying, "JPEG", exif=exif_block(6)), shrink_to=(160, 120)).rgb.shape == (240 // 2, 160, 3)


def test_plain_path_equals_the_general_path():
    picture = photograph(201, 133, 1)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}):
        data = saved(Image.fromarray(picture), "JPEG", **options)
        assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    grey = saved(Image.fromarray(picture[..., 0]), "JPEG")
    assert np.array_equal(decode_rgb(grey), np.asarray(Image.open(io.BytesIO(grey)).convert("RGB")))


@pytest.mark.parametrize(("factor", "margin"), [(2, 1.5), (2, 1.0), (4, 1.75), (8, 2.0)])
def test_reduced_decoding_stays_over_40_db(factor, margin):
    for seed in range(2):
        want = (640 // factor, 480 // factor)
        size = (int(want[0] * margin) // 2 * 2 * factor, int(want[1] * margin) // 2 * 2 * factor)
        data = saved(Image.fromarray(photograph(*size, seed)), "JPEG", quality=88)
        reduced = decode_rgb(data, shrink_to=want)
        assert reduced.shape[:2] == (size[1] // factor, size[0] // factor)
        full = cv2.resize(decode_rgb(data), want, interpolation=cv2.INTER_AREA)
        assert psnr(cv2.resize(reduced, want, interpolation=cv2.INTER_AREA), full) > 40


def test_odd_sides_are_not_reduced():
    data = saved(Image.fromarray(smooth(801, 600)), "JPEG")
    assert decode_rgb(data, shrink_to=(80, 60)).shape == (600, 801, 3)


def test_cmyk_and_its_inverted_adobe_form():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # red
    for kind in ("JPEG", "TIFF"):
        decoded = decode(saved(cmyk, kind))
        assert decoded.rgb.shape == (32, 32, 3)
        assert decoded.rgb[16, 16, 0] > 200
        assert decoded.rgb[16, 16, 1] < 60
        assert not decoded.plain


def test_sixteen_bits_are_scaled_not_cut():
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    for kind in ("PNG", "TIFF"):
        decoded = decode(saved(Image.fromarray(ramp), kind))
        assert not decoded.plain
        row = decoded.rgb[0, :, 0].astype(int)
        assert row[0] == 0
        assert row[-1] == 255
        assert np.abs(row - np.rint(ramp[0] / 257)).max() <= 1
    colour = np.stack([ramp, ramp[:, ::-1], ramp], -1)
    done, png = cv2.imencode(".png", colour[..., ::-1])
    assert done
    deep = decode(png.tobytes())
    assert not deep.plain
    assert np.abs(deep.rgb.astype(int) - np.rint(colour / 257)).max() <= 1


def test_float_tiff_is_scaled():
    ramp = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (4, 1))
    assert decode_rgb(saved(Image.fromarray(ramp), "TIFF"))[0, -1].tolist() == [255, 255, 255]


def test_alpha_lies_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 3] = [0, 128, 255, 255]
    for kind in ("PNG", "WEBP"):
        decoded = decode(saved(Image.fromarray(rgba), kind, lossless=True))
        assert decoded.rgb[0, :, 0].tolist() == [255, 127, 0, 0]
        assert not decoded.plain


def test_opaque_alpha_changes_nothing():
    rgba = np.dstack([smooth(), np.full((40, 60), 255, np.uint8)])
    decoded = decode(saved(Image.fromarray(rgba), "PNG"))
    assert decoded.plain
    assert np.array_equal(decoded.rgb, smooth())


def test_palette_with_transparent_entry():
    palette = Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 756)
    palette.putdata([0, 0, 1, 1])
    decoded = decode(saved(palette, "PNG", transparency=1))
    assert decoded.rgb[0].tolist() == [[255, 0, 0]] * 2 + [[255, 255, 255]] * 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_foreign_profile_is_converted(kind):
    red = Image.new("RGB", (16, 16), (250, 20, 20))
    decoded = decode(saved(red, kind, icc_profile=adobe_like_profile(), **({"quality": 95} if kind != "TIFF" else {})))
    assert decoded.rgb[8, 8, 1] > 200, "the profile calls this colour green"
    assert decoded.rgb[8, 8, 0] < 120
    assert not decoded.plain


def test_profile_is_applied_to_reduced_pixels_too():
    picture = Image.fromarray(smooth(640, 480))
    data = saved(picture, "JPEG", icc_profile=adobe_like_profile(), quality=95)
    reduced = decode(data, shrink_to=(160, 120))
    assert reduced.rgb.shape == (120, 160, 3)
    full = cv2.resize(decode_rgb(data), (160, 120), interpolation=cv2.INTER_AREA)
    assert psnr(reduced.rgb, full) > 40


def test_srgb_profile_changes_nothing_and_a_broken_one_is_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode_rgb(saved(Image.fromarray(smooth()), "JPEG"))
    for profile in (srgb, b"not a profile at all", adobe_like_profile()[:200]):
        decoded = decode(saved(Image.fromarray(smooth()), "JPEG", icc_profile=profile))
        assert np.array_equal(decoded.rgb, plain)
        assert decoded.plain


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    decoded = decode(data)
    assert decoded.rgb[5, 5, 0] > 240
    assert decoded.rgb[5, 5, 2] < 10
    assert not decoded.plain


def jpeg_with(marker: int, body: bytes) -> bytes:
    plain = saved(Image.fromarray(smooth()), "JPEG")
    return plain[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + plain[2:]


@pytest.mark.parametrize(
    "body",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",
        b"Exif\0\0" + b"\xff" * 300,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    ],
)
def test_broken_exif_never_fails_a_good_image(body):
    decoded = decode(jpeg_with(0xE1, body))
    assert np.array_equal(decoded.rgb, decode_rgb(saved(Image.fromarray(smooth()), "JPEG")))
    assert not decoded.plain, "others would trip over these bytes, so they are not kept"


def test_broken_xmp_and_profile_parts_never_fail_a_good_image():
    expected = decode_rgb(saved(Image.fromarray(smooth()), "JPEG"))
    for data in (
        jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta <<< broken \xff\xfe"),
        jpeg_with(0xE2, b"ICC_PROFILE\0\x03\x02half of it"),
        jpeg_with(0xEE, b"Adobe"),
    ):
        assert np.array_equal(decode_rgb(data), expected)


def png_with_chunk(name: bytes, body: bytes, good_crc: bool = True) -> bytes:
    plain = saved(Image.fromarray(smooth()), "PNG")
    crc = zlib.crc32(name + body) ^ (0 if good_crc else 1)
    return plain[:33] + struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc) + plain[33:]


@pytest.mark.parametrize(
    ("name", "body", "good_crc"),
    [
        (b"tEXt", b"Comment\0wrong sum", False),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000)), True),
        (b"iCCP", b"name\0\0not compressed", True),
        (b"eXIf", b"\xff" * 40, True),
    ],
)
def test_broken_png_metadata_never_fails_a_good_image(name, body, good_crc):
    assert np.array_equal(decode_rgb(png_with_chunk(name, body, good_crc)), smooth())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_images_are_decode_errors(share):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = saved(Image.fromarray(photograph(120, 90, 3)), kind)
        with pytest.raises(ImageError) as caught:
            decode(data[: int(len(data) * share)], shrink_to=(1, 1))
        assert caught.value.status == "decode_error"


def test_garbage_after_the_magic_bytes_is_a_decode_error():
    for magic in (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"II*\0",
        b"RIFF\0\0\0\0WEBP",
        b"BM\0\0\0\0\0\0\0\0",
    ):
        for tail in (b"", RNG.bytes(2000)):
            with pytest.raises(ImageError) as caught:
                decode_rgb(magic + tail)
            assert caught.value.status in ("decode_error", "bomb")


def test_pixel_bomb_is_refused_from_its_header():
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    gif = b"GIF89a" + struct.pack("<HHBBB", 50000, 50000, 0, 0, 0)
    small = saved(Image.fromarray(smooth()), "TIFF")
    for data, limit in ((bomb, 64 << 20), (gif, 64 << 20), (small, 2399)):
        with pytest.raises(ImageError) as caught:
            header(data, limit)
        assert caught.value.status == "bomb"
    assert header(small, 2400).width == 60


def test_gif_frame_larger_than_its_screen_is_seen():
    data = bytearray(saved(Image.new("P", (10, 10)), "GIF"))
    at = data.index(b",", 13)
    struct.pack_into("<HH", data, at + 5, 9000, 9000)
    with pytest.raises(ImageError) as caught:
        decode_rgb(bytes(data))
    assert caught.value.status == "bomb"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_encode_is_deterministic_and_near(kind):
    picture = photograph(90, 70, 4)
    data = encode(picture, kind, 95)
    assert data == encode(picture.copy(), kind, 95)
    assert sniff(data) == kind
    assert psnr(decode_rgb(data), picture) > 30
    if kind == "png":
        assert np.array_equal(decode_rgb(data), picture)


def test_encode_refuses_other_kinds():
    with pytest.raises(ValueError, match="jpeg, png or webp"):
        encode(smooth(), "gif")


def test_exif_orientation_of_both_byte_orders():
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        for kind, code in ((3, "H"), (4, "I")):
            value = struct.pack(order + code, 6).ljust(4, b"\0")
            block = mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value
            assert exif_orientation(block) == 6
            assert exif_orientation(block[:-1]) is None


def test_without_metadata_keeps_the_pixels():
    data = jpeg_with(0xE1, exif_block(6))
    bare = without_metadata(data, "jpeg")
    assert bare is not None
    assert b"Exif" not in bare
    assert decode(bare).rgb.shape == (40, 60, 3)
    assert without_metadata(data, "webp") is None


SEEDS = [saved(Image.fromarray(smooth()), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=9)), max_size=4), st.data())
def test_damaged_bytes_are_an_image_or_an_image_error(data, damages, draw):
    damaged = bytearray(data[: draw.draw(st.integers(0, len(data)))] if draw.draw(st.booleans()) else data)
    for at, put in damages:
        damaged[at : at + len(put)] = put
    with contextlib.suppress(ImageError):
        decoded = decode(bytes(damaged), shrink_to=(8, 8), max_pixels=1 << 20)
        assert decoded.rgb.dtype == np.uint8
        assert decoded.rgb.shape[2] == 3
        assert decoded.width * decoded.height <= 1 << 20
