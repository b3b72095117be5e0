from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from extractors.config import PatchesConfig
from extractors.patches import extract_patches
from schemas.features import about
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.reader import MappedShard, read_table
from shards.transforms import centre_crop, patchify, resize_shorter, resize_vilt, unpatchify
from tests.extractors.conftest import CORRUPT, FAIL
from tests.make import make_dataset, picture


def mapped(dataset: Dataset, shard: int, name: str = "patches") -> MappedShard:
    return MappedShard(dataset.folder, dataset.stage(f"features/{name}").file(shard))


def images(dataset: Dataset, shard: int) -> list[bytes]:
    return read_table(dataset.folder, dataset.stage(PAIRS).file(shard))["image"].to_pylist()


@pytest.mark.parametrize("layout", ["vilt", "square"])
def test_patches_are_those_of_the_live_transform(dataset: Dataset, layout: str):
    config = PatchesConfig(layout=layout, size=64, patch=16, workers=0)
    assert extract_patches(dataset, config).counts["ok"] == 32
    for shard in range(3):
        for number, (data, states) in enumerate(
            zip(images(dataset, shard), mapped(dataset, shard).states(), strict=True)
        ):
            row = mapped(dataset, shard).row(number)
            if (shard, number) in FAIL or (shard, number) in CORRUPT:
                assert states != "ok"
                assert row["patches"] is None
                continue
            rgb = decode_rgb(data)
            live = resize_vilt(rgb, 64, 16) if layout == "vilt" else centre_crop(resize_shorter(rgb, 64), 64)
            np.testing.assert_array_equal(row["patches"], patchify(live, 16))
            np.testing.assert_array_equal(unpatchify(row["patches"], row["rows"], row["cols"], 16), live)


def test_vilt_keeps_the_aspect_in_whole_patches(tmp_path: Path):
    dataset = make_dataset(tmp_path / "ds", 1, 1, image=lambda s, r: picture(640, 480))
    extract_patches(dataset, PatchesConfig(workers=0))
    row = mapped(dataset, 0).row(0)
    assert (row["cols"] * 32, row["rows"] * 32) == (512, 384)  # models-patch: 640 x 480 becomes 512 x 384
    assert row["patches"].shape == (192, 3072)
    assert row["patches"].dtype == np.uint8


def test_the_file_says_how_it_was_cut(dataset: Dataset):
    extract_patches(dataset, PatchesConfig(layout="square", size=48, patch=16, name="small", workers=0))
    assert about(mapped(dataset, 0, "small").schema) == {"layout": "square", "size": 48, "patch": 16}
    assert dataset.stage("features/small").sidecar().identity["layout"] == "square"


def test_a_stripe_is_a_bad_aspect_not_a_memory_bomb(tmp_path: Path):
    dataset = make_dataset(tmp_path / "ds", 1, 2, image=lambda s, r: picture(2 + 998 * r, 2))
    finished = extract_patches(dataset, PatchesConfig(size=32, workers=0))
    assert finished.counts == {"ok": 1, "bad_aspect": 1}


def test_a_size_that_is_no_multiple_is_refused():
    with pytest.raises(ValidationError, match="`size` must be a multiple of `patch`"):
        PatchesConfig(size=100)
