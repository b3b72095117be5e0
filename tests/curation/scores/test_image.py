"""`score image`: pictures with known answers, the reduced decode beside the full one, states and resume."""

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photograph
from curation.scores.config import ImageScoreConfig
from curation.scores.image import SIDE, ImageScorer, dominant_share, entropy, grid, is_grey, score_image, sharpness
from shards.images import decode_rgb
from shards.scan import scan
from tests.make import encode, make_dataset

CONFIG = ImageScoreConfig(workers=0)


def jpeg(pixels, quality=90):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def flat(level, height=60, width=90):
    return np.full((height, width, 3), level, np.uint8)


def prepared(data, width, height):
    rgb = decode_rgb(data, at_least=ImageScorer.at_least)
    return ImageScorer().prepare(rgb, {"width": width, "height": height, "image_bytes": len(data)})


def test_a_flat_picture_has_no_contrast_no_edges_no_entropy_and_one_colour():
    found = prepared(encode(flat(100), "png"), 90, 60)
    assert found["aspect"] == 1.5
    assert (found["mean"], found["contrast"], found["sharpness"], found["entropy"]) == (100, 0, 0, 0)
    assert found["dominant_share"] == 1
    assert found["is_grey"]


def test_half_black_half_white():
    pixels = flat(0)
    pixels[:, 45:] = 255
    found = prepared(encode(pixels, "png"), 90, 60)
    assert found["mean"] == 127.5
    assert found["contrast"] == 127.5
    assert found["entropy"] == pytest.approx(1, abs=0.01)  # half of the columns of the grid are white
    assert found["dominant_share"] == pytest.approx(0.5, abs=0.02)


def test_bytes_per_pixel_are_those_of_the_stored_file():
    data = encode(flat(9), "png")
    assert prepared(data, 90, 60)["bytes_per_pixel"] == len(data) / 5400


def test_entropy_of_evenly_spread_levels_is_eight_bits():
    assert entropy(np.arange(256, dtype=np.uint8).reshape(16, 16)) == 8


def test_dominant_share_counts_boxes_of_32_levels():
    pixels = flat(31, 10, 10)
    pixels[:3] = 32
    pixels[3] = 0
    assert dominant_share(pixels) == pytest.approx(0.7)


def test_grey_allows_what_jpeg_does_to_it_and_no_colour():
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (64, 64, 1)).astype(np.uint8), 3, 2)
    assert is_grey(grid(decode_rgb(jpeg(grey, 50))))
    tinted = grey // 2
    tinted[..., 0] += 9
    assert not is_grey(tinted)
    tinted[..., 0] -= 1
    assert is_grey(tinted)


def test_grid_reads_evenly_spaced_pixels():
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(200)[:, None], np.arange(300)[None] % 256
    at = np.arange(64)
    assert (grid(pixels)[:, 0, 0] == at * 200 // 64).all()
    assert (grid(pixels)[0, :, 1] == at * 300 // 64 % 256).all()


def test_sharpness_is_the_variance_of_the_laplacian_at_the_fixed_size():
    luma = cv2.cvtColor(photograph(SIDE, SIDE, 3), cv2.COLOR_RGB2GRAY)
    smooth = cv2.sepFilter2D(luma, -1, np.array([0.25, 0.5, 0.25]), np.array([0.25, 0.5, 0.25])).astype(int)
    padded = np.pad(smooth, 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * smooth
    assert sharpness(luma) == pytest.approx(laplacian.var(), rel=0.02)


def test_sharpness_falls_with_blur_and_hardly_with_size():
    big = photograph(1536, 1152, 3)
    luma = {
        size: cv2.cvtColor(cv2.resize(big, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        for size in ((400, 300), (511, 385), (640, 480), (1024, 768))
    }
    values = [sharpness(one) for one in luma.values()]
    assert max(values) < 1.2 * min(values)
    blurred = [sharpness(cv2.GaussianBlur(luma[640, 480], (0, 0), sigma)) for sigma in (1, 2, 4, 8)]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[-1] < 0.2 * values[2]


@pytest.mark.parametrize("size", [(512, 384), (511, 385), (800, 600), (1600, 1200)])
def test_a_reduced_jpeg_gives_the_numbers_of_the_whole_one(size):
    data = jpeg(photograph(*size, 5))
    row = {"width": size[0], "height": size[1], "image_bytes": len(data)}
    whole, reduced = decode_rgb(data), decode_rgb(data, at_least=SIDE)
    assert min(reduced.shape[:2]) >= SIDE
    assert reduced.shape[0] <= whole.shape[0] // 2 + 1
    one, other = (ImageScorer().prepare(rgb, row) for rgb in (whole, reduced))
    assert one["mean"] == pytest.approx(other["mean"], abs=1)
    assert one["contrast"] == pytest.approx(other["contrast"], rel=0.03)
    assert one["sharpness"] == pytest.approx(other["sharpness"], rel=0.2)
    assert one["entropy"] == pytest.approx(other["entropy"], abs=0.1)
    assert one["dominant_share"] == pytest.approx(other["dominant_share"], abs=0.02)


def test_rows_without_an_image_are_null_with_their_state(tmp_path):
    dataset = make_dataset(tmp_path / "data", fail={(0, 1): "timeout", (1, 2): "no_image"}, corrupt=[(1, 0)])
    finished = score_image(dataset, CONFIG)
    found = scan(dataset.stage("scores/image")).collect()
    states = found["image_state"].to_list()
    assert (states[0], states[1], states[8], states[10]) == ("ok", "timeout", "decode_error", "no_image")
    assert found.row(1)[:-1] == (None,) * 8
    assert found["mean"].null_count() == 3
    assert finished.counts == {"ok": 13, "timeout": 1, "decode_error": 1, "no_image": 1}
    assert score_image(dataset, CONFIG).done == 0
    columns = json.loads((tmp_path / "data/scores/image/sidecar.json").read_text())["columns"]
    assert set(columns) == set(found.columns) - {"image_state"}
    assert found["aspect"][0] == pytest.approx(64 / 48)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    one, two = make_dataset(tmp_path / "one"), make_dataset(tmp_path / "two")
    score_image(one, CONFIG)
    score_image(two, ImageScoreConfig(workers=2))
    (tmp_path / "two/scores/image/00000.parquet").unlink()
    assert score_image(two, CONFIG).done == 1
    for name in ("sidecar.json", "00000.parquet", "00001.parquet"):
        assert (tmp_path / "one/scores/image" / name).read_bytes() == (
            tmp_path / "two/scores/image" / name
        ).read_bytes()


def test_the_largest_possible_stripe_is_measured():
    stripe = photograph(64, 64, 1)[:1, :, :].repeat(200, axis=1)
    assert prepared(encode(stripe, "png"), stripe.shape[1], 1)["aspect"] == stripe.shape[1]
