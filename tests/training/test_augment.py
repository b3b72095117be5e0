"""Augmentation: what is drawn, what stays an image, and what is refused on patch tensors."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from schemas.errors import PairmillError
from shards.transforms import patchify, resize_square
from training.augment import NAMES, OPERATIONS, Augmentation, draw_crop, rand_augment


def picture(height=24, width=18, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_every_recipe_gives_an_image_and_repeats(name, height, width, seed):
    image = picture(height, width)
    before = image.copy()
    augment = Augmentation(name, size=16)
    first = augment(image, np.random.default_rng(seed))
    again = augment(Image.fromarray(image), np.random.default_rng(seed))
    assert first.dtype == np.uint8
    assert first.shape == ((16, 16, 3) if name == "clip-crop" else image.shape)
    assert np.array_equal(first, again)
    first[:] = 0
    assert np.array_equal(image, before)


def test_none_changes_nothing_and_the_others_something():
    image = picture()
    plain = dict.fromkeys(NAMES, image) | {"clip-crop": resize_square(image, 24)}
    changed = {}
    for name in NAMES:
        results = [Augmentation(name, size=24)(image, np.random.default_rng(seed)) for seed in range(20)]
        changed[name] = sum(not np.array_equal(result, plain[name]) for result in results)
    assert changed["none"] == 0
    assert 0 < changed["flip"] < 20
    assert changed["vilt-randaug"] >= 15
    assert changed["clip-crop"] >= 15


def test_rand_augment_draws_every_operation_and_both_signs(monkeypatch):
    seen = {}
    for name, operation in OPERATIONS.items():

        def note(image, value, name=name):
            seen.setdefault(name, set()).add(value)
            return image

        monkeypatch.setitem(OPERATIONS, name, replace(operation, apply=note))
    rng = np.random.default_rng(0)
    for _ in range(200):
        rand_augment(picture(), rng)
    assert set(seen) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        value = operation.value(9)
        assert seen[name] == ({value, -value} if operation.signed else {value})


def test_no_operations_is_the_image():
    assert np.array_equal(rand_augment(picture(), np.random.default_rng(0), n=0), picture())


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_a_crop_lies_inside(height, width, seed):
    top, left, box_height, box_width = draw_crop(height, width, np.random.default_rng(seed))
    assert 0 <= top < top + box_height <= height
    assert 0 <= left < left + box_width <= width


def test_a_crop_keeps_scale_and_ratio():
    rng = np.random.default_rng(0)
    boxes = [draw_crop(100, 100, rng, scale=(0.2, 0.5)) for _ in range(300)]
    areas = [h * w / 1e4 for _, _, h, w in boxes]
    ratios = [w / h for _, _, h, w in boxes]
    assert 0.19 < min(areas) < 0.25
    assert 0.45 < max(areas) < 0.51
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.37
    assert len({top for top, *_ in boxes}) > 20


def test_a_long_image_gets_the_largest_middle_box():
    # Ten tries at 90 % of the area cannot fit a ratio of 4/3 at most: torchvision's fallback.
    assert draw_crop(30, 900, np.random.default_rng(0)) == (0, 430, 30, 40)
    assert draw_crop(900, 30, np.random.default_rng(0)) == (430, 0, 40, 30)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_patches_are_the_patches_of_the_flipped_image(seed):
    image = picture(16, 24)
    flip = Augmentation("flip")
    on_image = patchify(flip(image, np.random.default_rng(seed)), 8)
    on_patches = flip.patches(patchify(image, 8), 2, 3, np.random.default_rng(seed))
    assert np.array_equal(on_image, on_patches)


@pytest.mark.parametrize("name", NAMES)
def test_only_flips_work_on_patches(name):
    augment = Augmentation(name, size=8)
    assert augment.on_patches == (name in ("none", "flip"))
    if augment.on_patches:
        augment.check_patches()
    else:
        with pytest.raises(PairmillError, match=f"`{name}` changes pixels.*--input images"):
            augment.patches(patchify(picture(8, 8), 8), 1, 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [("flips", None, "Did you mean `flip`"), ("clip-crop", None, "needs an image size"), ("clip-crop", 0, "px")],
)
def test_wrong_recipes(name, size, text):
    with pytest.raises(PairmillError, match=text):
        Augmentation(name, size)
