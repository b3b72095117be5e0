"""Sizes, crops and patches: against torchvision, against their inverses, and at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from schemas.errors import PairmillError
from shards import transforms as t

sides = st.integers(1, 90)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 40))
def test_clip_transform_equals_torchvision(height, width, size):
    image = picture(height, width)
    theirs = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    ours = t.resize_clip(image, size)
    assert np.array_equal(ours, np.array(theirs(Image.fromarray(image))))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 16), st.sampled_from([8, 16, 32]))
def test_vilt_size_is_bounded_and_keeps_the_patch(width, height, patches, patch):
    size = patches * patch
    new_width, new_height = t.vilt_size(width, height, size, patch)
    assert new_width % patch == 0 < new_width
    assert new_height % patch == 0 < new_height
    assert min(new_width, new_height) <= size
    assert max(new_width, new_height) <= max(int(1333 / 800 * size), size)
    assert (new_height, new_width) == t.vilt_size(height, width, size, patch)


def test_vilt_size_of_usual_photos():
    assert t.vilt_size(640, 480, 384) == (512, 384)
    assert t.vilt_size(640, 384, 384) == (608, 352)  # the bound of 639 px is in effect 608
    assert t.vilt_size(4000, 10, 384) == (608, 32)  # the original asks for a height of 0 here


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_patches_go_there_and_back(rows, columns, patch):
    image = picture(rows * patch, columns * patch)
    patches = t.patchify(image, patch)
    assert patches.shape == (rows * columns, patch * patch * 3)
    assert np.array_equal(patches[-1].reshape(patch, patch, 3), image[-patch:, -patch:])
    assert np.array_equal(t.unpatchify(patches, rows, columns, patch), image)
    assert np.array_equal(t.flip_patches(patches, rows, columns), t.patchify(t.flip(image), patch))
    assert torch.equal(t.patchify(torch.from_numpy(image)[None], patch)[0], torch.from_numpy(patches))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 17), st.sampled_from(sorted(t.NORMALISATIONS)))
def test_patchify_and_normalise_commute_bit_for_bit(rows, columns, patch, name):
    mean, std = t.NORMALISATIONS[name]
    image = picture(rows * patch, columns * patch)
    chw = torch.from_numpy(image).permute(2, 0, 1)[None]
    live = t.patchify(t.normalise(chw, mean, std).permute(0, 2, 3, 1), patch)
    stored = t.normalise(torch.from_numpy(t.patchify(image, patch))[None], mean, std)
    assert torch.equal(live, stored)
    in_numpy = t.normalise_array(t.patchify(image, patch), mean, std)
    assert np.array_equal(in_numpy, t.patchify(t.normalise_array(image, mean, std), patch))
    np.testing.assert_allclose(in_numpy, stored[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("name", sorted(t.NORMALISATIONS))
def test_normalise_equals_torchvision_and_leaves_its_input(name):
    mean, std = t.NORMALISATIONS[name]
    pixels = torch.from_numpy(picture(8, 6)).permute(2, 0, 1)
    before = pixels.clone()
    theirs = v2.functional.normalize(pixels.float() / 255, mean, std)
    assert torch.equal(t.normalise(pixels[None], mean, std)[0], theirs)
    assert torch.equal(pixels, before)


def test_resized_crop_equals_crop_then_resize():
    image = picture(30, 40)
    box = Image.fromarray(image).crop((5, 3, 25, 23))
    theirs = np.array(box.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(t.resized_crop(image, 3, 5, 20, 20, 16), theirs)


def test_results_own_their_memory():
    image = picture(8, 8)
    image.flags.writeable = False
    for result in (t.resize(image, 8, 8), t.flip(image)):
        result[:] = 0
    assert image.any()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: t.resize(np.zeros((0, 5, 3), np.uint8), 4, 4), "the image has no pixels: 5 x 0"),
        (lambda: t.resize_vilt(np.zeros((5, 0, 3), np.uint8), 64), "the image has no pixels: 0 x 5"),
        (lambda: t.resize_clip(np.zeros((5, 0, 3), np.uint8), 64), "the image has no pixels: 0 x 5"),
        (lambda: t.resize(picture(4, 4).astype(np.float32), 4, 4), r"must be uint8 \[H, W, 3\], got float32"),
        (lambda: t.resize(picture(4, 4)[:, :, 0], 4, 4), r"got uint8 \[4, 4\]"),
        (lambda: t.resize(picture(4, 4), 0, 4), "at least 1 px"),
        (lambda: t.centre_crop(picture(4, 9), 5), "cannot crop 5 x 5 px out of 9 x 4"),
        (lambda: t.resized_crop(picture(4, 4), 2, 0, 3, 2, 8), "is not inside the 4 x 4 image"),
        (lambda: t.resized_crop(picture(4, 4), 2, 0, 0, 2, 8), "is not inside the 4 x 4 image"),
        (lambda: t.patchify(picture(8, 12), 8), "12 x 8 px cannot be cut into patches of 8 x 8"),
        (lambda: t.patchify(picture(0, 8), 8), "cannot be cut"),
        (lambda: t.unpatchify(np.zeros((6, 12), np.uint8), 2, 2, 2), "6 patches of width 12 are not 2 x 2"),
        (lambda: t.normalise(torch.zeros(3, 4, 4, dtype=torch.uint8), t.CLIP_MEAN, t.CLIP_STD), r"got \[3, 4, 4\]"),
        (lambda: t.normalise(torch.zeros(1, 3, 4, 4), t.CLIP_MEAN, t.CLIP_STD), "must be uint8, got torch.float32"),
    ],
)
def test_what_cannot_be_done_says_so(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("size", "patch"), [(100, 32), (16, 32), (32, 0), (0, 16)])
def test_a_size_that_is_no_multiple_of_the_patch(size, patch):
    with pytest.raises(PairmillError, match=f"got size {size} and patch {patch}"):
        t.check_patch_size(size, patch)
