"""`score hash`: equal to ImageHash, near for near copies, far for others; bit order and pixel hash by hand."""

import hashlib
import io
import json

import cv2
import imagehash
import numpy as np
import polars as pl
import pytest
from PIL import Image

from benchmarks.photographs import photograph
from curation.scores.config import HashScoreConfig
from curation.scores.hashes import dhash, luma, phash, pixel_sha256, score_hash
from schemas.pairs import pairs_schema
from shards.images import decode_rgb
from shards.reader import read_table
from shards.scan import scan
from shards.writer import write_pairs
from tests.make import make_dataset, picture

CONFIG = HashScoreConfig(workers=0)


def number(found):
    return int(str(found), 16)


def bits(one, other):
    return (one ^ other).bit_count()


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_imagehash(seed):
    rng = np.random.default_rng(seed)
    pixels = photograph(int(rng.integers(20, 400)), int(rng.integers(20, 400)), seed)
    grey, image = luma(pixels), Image.fromarray(pixels)
    assert phash(grey) == number(imagehash.phash(image))
    assert dhash(grey) == number(imagehash.dhash(image))


def test_a_flat_picture_has_only_the_constant_bit():
    for level in (1, 77, 255):
        grey = luma(np.full((50, 61, 3), level, np.uint8))
        assert phash(grey) == 1 << 63
        assert dhash(grey) == 0


def test_mirrored_halves_give_the_same_bits_on_every_machine():
    """Frequencies that are nothing but rounding errors are rounded to nothing: none of them sets a bit by chance."""
    half = photograph(128, 256, 4)
    grey = luma(np.concatenate([half, half[:, ::-1]], 1))
    odd = int("01010101" * 8, 2)  # every second column of frequencies is 0 for a picture that mirrors itself
    assert phash(grey) & odd in (0, odd)


def test_bit_order():
    grey = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1)), "L")
    assert dhash(grey) == 2**64 - 1
    pixels = np.zeros((8, 9), np.uint8)
    pixels[0, 1:] = 255  # one step, from the first to the second pixel of the top row
    assert dhash(Image.fromarray(pixels, "L")) == 1 << 63
    pixels = np.zeros((8, 9), np.uint8)
    pixels[7, 8] = 255  # the last step of the last row
    assert dhash(Image.fromarray(pixels, "L")) == 1


def copies(pixels):
    height, width = pixels.shape[:2]
    yield cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    yield cv2.resize(pixels, (width * 3 // 4, height * 3 // 4), interpolation=cv2.INTER_LINEAR)
    for kind, options in (("JPEG", {"quality": 60}), ("WEBP", {"quality": 70})):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, kind, **options)
        yield decode_rgb(out.getvalue())
    yield (pixels * 0.85 + 12).astype(np.uint8)


def test_near_copies_are_near_and_others_far():
    seeds = range(12)
    hashes = []
    for seed in seeds:
        pixels = photograph(400, 300, seed)
        first = luma(pixels)
        hashes.append((phash(first), dhash(first)))
        for copy in copies(pixels):
            other = luma(copy)
            assert bits(phash(first), phash(other)) <= 4
            assert bits(dhash(first), dhash(other)) <= 6
    for kind in range(2):
        apart = [bits(hashes[i][kind], hashes[j][kind]) for i in seeds for j in range(i)]
        assert min(apart) > 8


def test_pixels_are_hashed_as_a_ppm_file():
    pixels = picture(33, 20)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PPM")
    assert pixel_sha256(pixels) == hashlib.sha256(out.getvalue()).digest()
    assert pixel_sha256(pixels) != pixel_sha256(pixels.reshape(33, 20, 3))


def test_columns_states_and_types(tmp_path):
    dataset = make_dataset(tmp_path / "data", fail={(0, 1): "timeout"}, corrupt=[(1, 0)])
    score_hash(dataset, CONFIG)
    found = scan(dataset.stage("scores/hash")).collect()
    assert found.schema == {"phash": pl.UInt64, "dhash": pl.UInt64, "pixel_sha256": pl.Binary, "hash_state": pl.String}
    assert found["hash_state"].to_list()[:2] == ["ok", "timeout"]
    assert found.row(1)[:3] == (None, None, None)
    assert found.row(8)[:3] == (None, None, None)
    data = read_table(dataset.folder, "pairs/00000.parquet", ["image"])["image"][0].as_py()
    rgb = decode_rgb(data)
    assert found.row(0)[:3] == (phash(luma(rgb)), dhash(luma(rgb)), pixel_sha256(rgb))
    columns = json.loads((tmp_path / "data/scores/hash/sidecar.json").read_text())["columns"]
    assert all(set(columns[n]) >= {"what", "scale"} for n in ("phash", "dhash", "pixel_sha256"))


def test_a_retried_shard_is_hashed_again_and_only_that(tmp_path):
    dataset = make_dataset(tmp_path / "data", fail={(0, 1): "timeout"})
    score_hash(dataset, CONFIG)
    before = read_table(dataset.folder, "scores/hash/00000.parquet").to_pylist()
    rows = read_table(dataset.folder, "pairs/00000.parquet").to_pylist()
    rows[1] |= {"status": "success", "image": rows[0]["image"], "sha256": b"2" * 32}
    with write_pairs(dataset.folder, "pairs/00000.parquet", pairs_schema()) as writer:
        for row in rows:
            writer.append(row)
    assert dataset.stage("scores/hash").pending() == [0]
    assert score_hash(dataset, CONFIG).done == 1
    after = read_table(dataset.folder, "scores/hash/00000.parquet").to_pylist()
    assert after[1] == after[0]
    assert [a for i, a in enumerate(after) if i != 1] == [b for i, b in enumerate(before) if i != 1]
