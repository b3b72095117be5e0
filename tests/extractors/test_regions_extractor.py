"""`extract regions` over a dataset: rows, states, given boxes, resume, errors."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from cli.demo.scenes import generate_scene
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import RegionLoader, extract_regions, given_boxes
from extractors.regions.protocol import find_regions
from extractors.regions.selection import rows_from_proposals
from schemas.errors import PairmillError
from schemas.features import about
from shards.images import ImageError, decode_rgb
from shards.reader import MappedShard, read_table
from tests.make import make_dataset

QUICK = {"workers": 0, "device": "cpu", "batch_size": 3, "proposals": 30}
SIZES = ((96, 96), (96, 140), (128, 128), (140, 96))


def _scene(shard, row):
    number = 10 * shard + row
    return generate_scene(number, SIZES[number % len(SIZES)]).image


def _scenes(path, **options):
    return make_dataset(path, shards=2, rows=5, image=_scene, kind="png", **options)


def _shard(dataset, shard, name="regions"):
    return MappedShard(dataset.folder, dataset.stage(f"features/{name}").file(shard))


def test_rows_are_those_of_the_detector_image_by_image(tmp_path):
    dataset = _scenes(tmp_path / "ds", fail={(0, 2): "timeout"}, corrupt={(1, 1)})
    config = RegionsConfig(**QUICK)
    done = extract_regions(dataset, config)
    assert not done.left
    detector = load_detector(config)
    for shard in range(2):
        images = read_table(dataset.folder, dataset.stage("pairs").file(shard), ["image"])["image"]
        mapped = _shard(dataset, shard)
        for row, state in enumerate(mapped.states()):
            stored = mapped.row(row)
            if (shard, row) in ((0, 2), (1, 1)):
                assert state == ("timeout" if shard == 0 else "decode_error")
                assert stored["features"] is None
                continue
            assert state == "ok"
            want = rows_from_proposals(find_regions(detector, [decode_rgb(images[row].as_py())])[0], config)
            assert stored["num_boxes"] == want["num_boxes"] > 0
            assert np.allclose(np.array(stored["boxes"]), want["boxes"], atol=1e-2)
            assert np.allclose(stored["features"], want["features"], atol=2e-2)
            assert np.allclose(stored["cls_probs"], want["cls_probs"], atol=2e-3)
            assert np.allclose(stored["det_conf"], want["det_conf"], atol=1e-3)
            assert (np.diff(stored["det_conf"]) <= 0).all()
            assert stored["image_feat"].shape == (detector.feature_dim,)


def test_class_names_and_detector_are_stored(tmp_path):
    dataset = _scenes(tmp_path / "ds")
    extract_regions(dataset, RegionsConfig(**QUICK, cls_probs="topk:3", name="few", max_boxes=5, min_boxes=2))
    told = about(_shard(dataset, 0, "few").schema)
    assert told["classes"][:2] == ["red circle", "orange circle"]
    assert told["detector"].startswith("torchvision:tiny:")
    row = _shard(dataset, 0, "few").row(0)
    assert row["cls_topk_idx"].shape == (row["num_boxes"], 3)
    assert 2 <= row["num_boxes"] <= 5


def test_a_rerun_does_nothing_and_another_detector_is_refused(tmp_path):
    dataset = _scenes(tmp_path / "ds")
    extract_regions(dataset, RegionsConfig(**QUICK))
    assert extract_regions(dataset, RegionsConfig(**QUICK)).done == 0
    with pytest.raises(PairmillError, match="conf"):
        extract_regions(dataset, RegionsConfig(**QUICK, conf=0.5))


BOXES = pa.list_(pa.list_(pa.float32()))


@pytest.mark.parametrize("space", ["stored", "original", "relative"])
def test_given_boxes_are_described_in_their_order(tmp_path, space):
    relative = [[0.5, 0.5, 0.9, 0.9], [0.1, 0.2, 0.6, 0.7]]

    def carry(shard, row):
        height, width = _scene(shard, row).shape[:2]
        scale = np.array([1.0] * 4 if space == "relative" else [width, height] * 2)
        return {"objects": None if row == 1 else (np.array(relative) * scale).tolist()}

    dataset = _scenes(tmp_path / "ds", carried=[pa.field("objects", BOXES)], carry=carry)
    extract_regions(dataset, RegionsConfig(**QUICK, boxes="objects", boxes_space=space, max_boxes=10))
    mapped = _shard(dataset, 1)
    for row in range(5):
        stored = mapped.row(row)
        assert stored["num_boxes"] == (0 if row == 1 else 2)
        if row != 1:
            height, width = _scene(1, row).shape[:2]
            assert np.allclose(np.array(stored["boxes"]), np.array(relative) * ([width, height] * 2), atol=1e-2)


def test_malformed_boxes_lose_their_row_only(tmp_path):
    cells = [[[0, 0, 10]], [[0, 0, float("nan"), 5]], [[0, 0, 10, 10]], [], None]
    dataset = _scenes(tmp_path / "ds", carried=[pa.field("at", BOXES)], carry=lambda shard, row: {"at": cells[row]})
    extract_regions(dataset, RegionsConfig(**QUICK, boxes="at"))
    assert _shard(dataset, 0).states() == ["decode_error", "decode_error", "ok", "ok", "ok"]


def test_original_pixels_are_scaled_to_the_stored_image():
    row = {"original_width": 400, "original_height": 100}
    boxes = given_boxes([[200, 50, 500, 100]], "original", row, (50, 100))
    assert boxes.tolist() == [[50, 25, 100, 50]]
    with pytest.raises(ImageError, match="original"):
        given_boxes([[0, 0, 1, 1]], "original", {"original_width": None, "original_height": 3}, (50, 100))


def test_an_unknown_boxes_column_is_named(tmp_path):
    dataset = _scenes(tmp_path / "ds")
    with pytest.raises(PairmillError, match="no such column of lists"):
        extract_regions(dataset, RegionsConfig(**QUICK, boxes="caption"))


def test_the_loader_is_known_without_a_model_and_its_example_runs():
    loader = RegionLoader.of(RegionsConfig(**QUICK))
    assert loader == RegionLoader.of(RegionsConfig(**QUICK))
    assert hash(loader) == hash(RegionLoader.of(RegionsConfig(**QUICK)))
    assert loader.bytes_per_row > 40 * 256 * 2
    extractor = loader.load(torch.device("cpu"))
    item = extractor.example()
    outputs = {k: v.numpy() for k, v in extractor(extractor.collate([item, item])).items()}
    rows = extractor.rows([item, item], outputs)
    assert [r["num_boxes"] for r in rows] == [rows[0]["num_boxes"]] * 2


def test_half_precision_stays_near(tmp_path):
    dataset = _scenes(tmp_path / "ds")
    extract_regions(dataset, RegionsConfig(**QUICK))
    extract_regions(dataset, RegionsConfig(**QUICK, precision="bf16", name="half"))
    one, other = _shard(dataset, 0).row(0), _shard(dataset, 0, "half").row(0)
    assert np.allclose(one["image_feat"], other["image_feat"], atol=0.1, rtol=0.1)
    assert one["obj_id"][0] == other["obj_id"][0]
    assert np.allclose(one["boxes"][0], other["boxes"][0], atol=4)
