"""What models read of stored rows: which rows, in which numbers; the geometry itself is in tests/parity."""

import numpy as np
import pytest

from extractors.regions import views
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from schemas.errors import PairmillError
from shards.reader import MappedShard
from tests.make import make_dataset

SIZE = (40, 80)


def row(count, dim=5, classes=6):
    draw = np.random.default_rng(count)
    start = draw.uniform(0, 30, (count, 2))
    probs = draw.dirichlet(np.ones(classes + 1), count) if count else np.zeros((0, classes + 1))
    return {
        "boxes": np.concatenate([start, start + draw.uniform(1, 9, (count, 2))], 1).astype(np.float32),
        "features": draw.normal(size=(count, dim)).astype(np.float16),
        "det_conf": np.linspace(0.9, 0.1, count, dtype=np.float32),
        "cls_probs": probs.astype(np.float16),
        "image_feat": draw.normal(size=dim).astype(np.float16),
    }


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (3, 3), (12, 10), (40, 35), (200, 100)])
def test_uniter_reads_the_confident_boxes_within_limits(count, kept):
    given = row(count)
    features, geometry = views.uniter(given, SIZE)
    assert np.array_equal(features, given["features"][:kept])
    assert geometry.shape == (kept, 7)
    assert geometry.dtype == np.float32


def test_geometry_by_hand():
    given = {**row(1), "boxes": np.array([[8, 10, 24, 30]], np.float32)}
    _, geometry = views.uniter(given, SIZE)
    assert np.allclose(geometry, [[0.1, 0.25, 0.3, 0.75, 0.2, 0.5, 0.1]])
    assert np.allclose(views.lxmert(given, SIZE, 1)[1], [[0.1, 0.25, 0.3, 0.75]])
    assert np.allclose(views.with_geometry(given, SIZE)[0, -6:], [0.1, 0.25, 0.3, 0.75, 0.2, 0.5])


def test_visualbert_and_vinvl_read_the_first_boxes():
    given = row(120)
    assert np.array_equal(views.visualbert(given), given["features"][:100])
    assert views.visualbert(given, 144).shape == (120, 5)
    both = views.with_geometry(given, SIZE)
    assert both.shape == (50, 11)
    assert both.dtype == np.float32
    assert np.array_equal(both[:, :5], given["features"][:50].astype(np.float32))


@pytest.mark.parametrize("count", [0, 5, 36, 60])
def test_lxmert_always_reads_36(count):
    given = row(count)
    features, geometry, mask = views.lxmert(given, SIZE)
    assert (features.shape, geometry.shape, mask.shape) == ((36, 5), (36, 4), (36,))
    assert mask.sum() == min(count, 36)
    assert np.array_equal(features[mask], given["features"][:36])
    assert not features[~mask].any()
    assert not geometry[~mask].any()


def test_vl_bert_reads_the_image_first():
    given = {**row(12), "boxes": np.array([[-3, 1, 99, 50]] * 12, np.float32)}
    features, boxes = views.vl_bert(given, SIZE)
    assert (features.shape, boxes.shape) == ((11, 5), (11, 6))
    assert boxes[0].tolist() == [0, 0, 79, 39, 80, 40]
    assert boxes[1].tolist() == [0, 1, 79, 39, 80, 40]
    wide = given["features"][:10].astype(np.float32)
    assert np.allclose(features[0], wide.sum(0) / (10 + 1e-5), atol=1e-6)
    masked = np.arange(10) < 4
    features, _ = views.vl_bert(given, SIZE, masked=masked)
    assert np.allclose(features[0], wide[4:].sum(0) / (6 + 1e-5), atol=1e-6)
    assert np.array_equal(features[1:], wide)
    features, _ = views.vl_bert(given, SIZE, stored_image=True)
    assert np.array_equal(features[0], given["image_feat"].astype(np.float32))
    nothing, whole = views.vl_bert(row(0), SIZE)
    assert not nothing.any()
    assert len(whole) == 1


def test_waves_are_those_of_the_text():
    """Order and lengths, number by number."""
    waves = views.position_waves(np.array([[10, 20, 30, 60, 200, 100]], np.float32), 4).reshape(4, 2, 4)
    for where, percent in enumerate((10, 40, 10, 40)):
        for i in range(4):
            angle = percent / 1000 ** (i / 4)
            assert np.allclose(waves[where, :, i], [np.sin(angle), np.cos(angle)], atol=1e-5)
    assert views.position_waves(np.zeros((0, 6), np.float32)).shape == (0, 2048)


def test_the_best_classes_leave_the_rest_to_the_others():
    given = {
        "cls_topk_idx": np.array([[2, 0], [3, 1]], np.int32),
        "cls_topk_p": np.array([[0.5, 0.25], [0.75, 0.25]], np.float16),
        "bg_p": np.array([0.125, 0.03], np.float32),  # the second row's sum is above 1, as float16 rounds
    }
    probs = views.class_probs(given, 4)
    assert np.allclose(probs, [[0.125, 0.25, 0.0625, 0.5, 0.0625], [0.03, 0, 0.25, 0, 0.75]])
    assert np.allclose(views.class_probs(given, 4)[0].sum(), 1)


def test_all_stored_classes_are_read_as_they_are():
    given = row(7)
    probs = views.class_probs(given, 6)
    assert probs.dtype == np.float32
    assert np.array_equal(probs, given["cls_probs"].astype(np.float32))
    del given["cls_probs"]
    with pytest.raises(PairmillError, match="--cls-probs full or topk:K"):
        views.class_probs(given, 6)


def test_stored_shards_are_read(tmp_path):
    """A tiny detector's rows, all classes and the best of them, in every view."""
    dataset = make_dataset(tmp_path / "ds", shards=1, rows=2)
    for name, kind in (("full", "full"), ("best", "topk:3")):
        extract_regions(dataset, RegionsConfig(name=name, cls_probs=kind, workers=0, min_boxes=4, max_boxes=8))
    stored = {n: MappedShard(dataset.folder, dataset.stage(f"features/{n}").file(0)).row(0) for n in ("full", "best")}
    count, dim = stored["full"]["features"].shape
    assert count >= 4
    for given in stored.values():
        assert views.uniter(given, SIZE)[1].shape == (count, 7)
        assert views.lxmert(given, SIZE)[2].sum() == count
        assert views.vl_bert(given, SIZE)[1].shape == (count + 1, 6)
        assert views.with_geometry(given, SIZE).shape == (count, dim + 6)
        assert views.visualbert(given, 3).shape == (3, dim)
    classes = stored["full"]["cls_probs"].shape[1] - 1
    all_of_them, best = (views.class_probs(given, classes) for given in stored.values())
    assert np.allclose(best.sum(1), 1, atol=2e-3)
    at = np.argsort(-all_of_them[:, 1:], 1, kind="stable")[:, :3] + 1
    assert np.allclose(np.take_along_axis(best, at, 1), np.take_along_axis(all_of_them, at, 1), atol=2e-3)
