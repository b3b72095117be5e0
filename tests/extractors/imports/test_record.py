"""Strange records become a reason, never a shard that fails."""

from __future__ import annotations

import numpy as np
import pytest

from extractors.imports.record import Classes, Record, RowError, Sizes, learn, record_of, row_of
from extractors.imports.run import Made
from schemas.errors import PairmillError
from tests.extractors.imports import written
from tests.extractors.imports.written import A, C, D

SIZES = Sizes((32, 24), (64, 48))
CLASSES = Classes(tuple(map(str, range(C))), True)


def values(**changed):
    r = written.regions(1, 4)
    w, h = r["size"]
    whole = {"features": r["features"], "boxes": r["boxes"], "image_w": w, "image_h": h, "cls_prob": r["probs"]}
    whole |= {"objects_id": r["obj"], "objects_conf": r["conf"], "attrs_id": r["attr"], "attrs_conf": r["attr_conf"]}
    return {k: v for k, v in {**whole, **changed}.items() if v is not None}


def row(**changed):
    layout = learn([record_of(values())], "auto", "f")
    return row_of(record_of(values(**changed)), layout, CLASSES, A, SIZES)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"features": None}, "no features among attrs_conf, attrs_id"),
        ({"features": np.full((4, D), np.nan)}, "features are not finite"),
        ({"features": np.full((4, D), 1e6)}, "too large for float16"),
        ({"features": np.array(["a"] * 4)}, "numbers are expected"),
        ({"features": np.zeros(4 * D + 1), "num_boxes": 4}, "33 numbers do not make 4 boxes"),
        ({"features": np.zeros(4 * D)}, "nothing says how many boxes"),
        ({"features": np.zeros((4, D)), "num_boxes": "many"}, "a whole number is expected"),
        ({"boxes": np.zeros((3, 4))}, "do not fit 4 features"),
        ({"features": np.zeros((0, D))}, "do not fit 0 features"),
        ({"boxes": np.full((4, 4), np.inf)}, "boxes are not finite"),
        ({"image_w": 640, "image_h": 640}, "made of an image of 640 x 640 px, this pair's has 64 x 48"),
        ({"objects_conf": np.full(4, np.nan)}, "confidences are not finite"),
        ({"objects_conf": np.zeros(3)}, "3 confidences for 4 features"),
        ({"objects_id": np.array([0, 1, 2, C])}, "class ids from 0 to 5 among 5 classes"),
        ({"attrs_id": np.array([0, 1, 2, 2**40])}, "among 3 attributes"),
        ({"cls_prob": np.zeros((4, C))}, "unlike the first rows'"),
        ({"cls_prob": np.zeros((2, C + 1))}, "2 class probabilities for 4 features"),
    ],
)
def test_what_makes_no_row(changed, reason):
    with pytest.raises(RowError, match=reason.replace("(", r"\(")):
        row(**changed)


def test_boxes_are_scaled_from_what_the_detector_saw():
    want = written.regions(1, 4)["boxes"]
    np.testing.assert_allclose(row()["boxes"], want / 2, atol=1e-4)
    np.testing.assert_allclose(row(image_w=None)["boxes"], want / 2, atol=1e-4)  # then it is the pair's original
    twice = row(image_w=128, image_h=96)["boxes"]
    np.testing.assert_allclose(twice, want / 4, atol=1e-4)
    assert np.asarray(row(boxes=want * 10)["boxes"]).max(0).tolist() == [32, 24, 32, 24]  # cut to the image


def test_an_image_without_boxes_is_ok():
    empty = {name: np.zeros((0, *np.shape(v)[1:])) for name, v in values().items() if np.ndim(v)}
    found = row(**empty)
    assert (found["state"], found["num_boxes"], found["boxes"]) == ("ok", 0, [])
    assert found["features"].shape == (0, D)
    assert found["cls_probs"].shape == (0, C + 1)


@pytest.mark.parametrize("background", ["first", "last", "none"])
def test_the_background_comes_first(background):
    probs = written.regions(1, 4)["probs"]
    theirs = {"first": probs, "last": np.roll(probs, -1, axis=1), "none": probs[:, 1:]}[background]
    record = record_of(values(cls_prob=theirs))
    layout = learn([record], "auto" if background != "last" else "last", "f")
    assert layout.classes == C
    np.testing.assert_allclose(row_of(record, layout, CLASSES, A, SIZES)["cls_probs"], probs, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 2, 3, D), (2, 3, D), (6, D)])
def test_maps_are_rows(shape):
    assert record_of({"features": np.zeros(shape)}).features.shape == (6, D)


def test_transposed_features_beside_boxes():
    r = written.regions(1, 4)
    found = record_of({"x": r["features"].T, "bbox": r["boxes"]})
    np.testing.assert_array_equal(found.features, r["features"])


def test_the_most_frequent_width_is_the_sets():
    widths = [Record(np.zeros((2, d), np.float32)) for d in (4, 8, 8, 16)]
    assert learn(widths, "auto", "f").dim == 8
    with pytest.raises(PairmillError, match="none of its first entries has a box"):
        learn([Record(np.zeros((0, 0), np.float32))], "auto", "f")


def test_names_without_a_list_of_them_give_no_ids():
    record = Record(np.zeros((1, D), np.float32), names=("dog",))
    layout = learn([record], "auto", "f")
    assert row_of(record, layout, Classes(("0",), False), A, SIZES)["obj_id"] is None
    assert row_of(record, layout, Classes(("cat", "dog"), True), A, SIZES)["obj_id"] == [1]
    with pytest.raises(RowError, match="class 'dog' is not in the file of --classes"):
        row_of(record, layout, Classes(("cat",), True), A, SIZES)


def test_the_schema_is_that_of_our_own_regions():
    layout = learn([record_of(values())], "auto", "f")
    made = Made(None, layout, CLASSES, ("a", "b", "c"), "features/x", False)  # type: ignore[arg-type]
    names = made.schema().names
    assert names == ["state", "num_boxes", "boxes", "features", "det_conf", "obj_id", "obj_conf", "attr_id",
                     "attr_conf", "cls_probs", "image_feat", "error"]  # fmt: skip
