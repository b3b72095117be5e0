"""The selection rule against a plain reading of it, and the columns that are stored."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Proposals
from extractors.regions.selection import keep_boxes, max_confidence, rows_from_proposals, visualbert_rows


def _iou(a, b, add):
    width = min(a[2], b[2]) - max(a[0], b[0]) + add
    height = min(a[3], b[3]) - max(a[1], b[1]) + add
    shared = max(0, width) * max(0, height)
    area = [(c[2] - c[0] + add) * (c[3] - c[1] + add) for c in (a, b)]
    return shared / (area[0] + area[1] - shared)


def _plain_confidence(boxes, probs, nms, add):
    """One class after the other, one box after the other."""
    boxes = boxes.astype(np.float64)
    found = np.zeros(len(boxes), np.float32)
    for scores in probs[:, 1:].T:
        kept = []
        for i in np.argsort(-scores, kind="stable"):
            if all(_iou(boxes[i], boxes[j], add) <= nms for j in kept):
                kept.append(i)
                found[i] = max(found[i], scores[i])
    return found


@st.composite
def proposals(draw):
    """Boxes in clusters and softmax scores: (boxes [R, 4], probs [R, C+1])."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, classes = draw(st.integers(0, 40)), draw(st.integers(1, 12))
    centres = rng.uniform(20, 180, (draw(st.integers(1, 6)), 2))
    centre = centres[rng.integers(0, len(centres), count)]
    corner = centre + rng.normal(0, 12, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (count, 2))], 1).astype(np.float32)
    logits = rng.normal(0, draw(st.floats(0.1, 4)), (count, classes + 1))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return boxes, probs.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(proposals(), st.floats(0.05, 0.95), st.booleans())
def test_confidence_is_that_of_the_plain_rule(case, nms, inclusive):
    boxes, probs = case
    ours = max_confidence(boxes, probs, nms, inclusive=inclusive)
    assert np.array_equal(ours, _plain_confidence(boxes, probs, nms, int(inclusive)))


@settings(max_examples=60, deadline=None)
@given(proposals(), st.floats(0, 1), st.integers(0, 20), st.integers(0, 30))
def test_stopping_early_keeps_the_same_boxes(case, conf, low, more):
    boxes, probs = case
    limits = {"conf": conf, "min_boxes": low, "max_boxes": low + more + 1}
    whole, short = max_confidence(boxes, probs), max_confidence(boxes, probs, **limits)
    kept, again = keep_boxes(whole, **limits), keep_boxes(short, **limits)
    assert np.array_equal(whole[kept], short[again])
    assert np.array_equal(kept[whole[kept] > 0], again[whole[kept] > 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), max_size=40), st.floats(0, 1), st.integers(0, 15), st.integers(0, 15))
def test_kept_boxes_obey_the_limits(confidence, conf, low, more):
    confidence = np.array(confidence, np.float32)
    kept = keep_boxes(confidence, conf, low, low + more)
    passed = (confidence >= conf).sum()
    assert len(kept) == min(max(passed, min(low, len(confidence))), low + more)
    assert len(set(kept.tolist())) == len(kept)
    assert (np.diff(confidence[kept]) <= 0).all()
    left = np.delete(confidence, kept)
    assert not len(left) or not len(kept) or left.max() <= confidence[kept].min()


def test_exact_overlap_is_kept_unless_equality_suppresses():
    # Two unit-high boxes of width 13 that share 6: 6 / 20 = 0.3.
    boxes = np.array([[0, 0, 13, 1], [7, 0, 20, 1]], np.float32)
    probs = np.array([[0.1, 0.9], [0.2, 0.8]], np.float32)
    assert max_confidence(boxes, probs, 0.3).tolist() == pytest.approx([0.9, 0.8])
    assert max_confidence(boxes, probs, 0.3, suppress_equal=True).tolist() == pytest.approx([0.9, 0])


def test_visualbert_reads_from_the_top_of_the_list():
    confidence = np.array([0.1, 0.9, 0.2, 0.8], np.float32)
    assert visualbert_rows(confidence, 0.5).tolist() == [1, 3]
    assert visualbert_rows(confidence, 0.5, max_cap=1).tolist() == [0]
    assert visualbert_rows(confidence, 0.95, min_cap=3).tolist() == [0, 1, 2]
    assert visualbert_rows(confidence, None, max_cap=2).tolist() == [0, 1]


def _proposals(count=6, classes=4, attributes=0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * 100
    boxes = torch.cat([corner, corner + 20], 1)
    return Proposals(
        boxes=boxes,
        features=torch.rand(count, 5, generator=rng),
        class_probs=torch.randn(count, classes + 1, generator=rng).softmax(1),
        image_feature=torch.rand(5, generator=rng),
        attribute_probs=torch.randn(count, attributes + 1, generator=rng).softmax(1) if attributes else None,
        regressed=boxes + 1,
    )


def test_stored_columns():
    found = _proposals(attributes=3)
    rows = rows_from_proposals(found, RegionsConfig(conf=0.0, max_boxes=4, min_boxes=1, nms=1.0))
    kinds = {k: (v.dtype.name, v.shape) for k, v in rows.items() if k != "num_boxes"}
    assert rows["num_boxes"] == 4
    assert kinds == {
        "boxes": ("float32", (4, 4)),
        "features": ("float16", (4, 5)),
        "det_conf": ("float32", (4,)),
        "obj_id": ("int32", (4,)),
        "obj_conf": ("float32", (4,)),
        "attr_id": ("int32", (4,)),
        "attr_conf": ("float32", (4,)),
        "cls_probs": ("float16", (4, 5)),
        "image_feat": ("float16", (5,)),
    }
    best = found.class_probs[:, 1:].max(1)
    order = best.values.argsort(descending=True)[:4]
    assert np.array_equal(rows["boxes"], found.boxes[order].numpy())
    assert np.array_equal(rows["features"], found.features[order].half().numpy())
    assert np.array_equal(rows["obj_id"], best.indices[order].numpy())
    assert np.array_equal(rows["det_conf"], best.values[order].numpy())
    attributes = found.attribute_probs[order, 1:].max(1)
    assert np.array_equal(rows["attr_id"], attributes.indices.numpy())
    assert np.array_equal(rows["attr_conf"], attributes.values.numpy())


def test_regressed_boxes_keep_their_proposals_features():
    found = _proposals()
    config = RegionsConfig(conf=0.0, min_boxes=0, nms=1.0, box_source="regressed")
    rows = rows_from_proposals(found, config)
    plain = rows_from_proposals(found, config.model_copy(update={"box_source": "proposal"}))
    assert np.allclose(rows["boxes"], plain["boxes"] + 1)
    assert np.array_equal(rows["features"], plain["features"])


def test_top_classes_and_none():
    found = _proposals(classes=6)
    config = RegionsConfig(conf=0.0, nms=1.0, min_boxes=0, cls_probs="topk:2")
    rows = rows_from_proposals(found, config)
    full = rows_from_proposals(found, config.model_copy(update={"cls_probs": "full"}))["cls_probs"]
    assert "cls_probs" not in rows
    assert np.array_equal(rows["cls_topk_idx"][:, 0], rows["obj_id"])
    assert np.array_equal(rows["bg_p"].astype(np.float16), full[:, 0])
    assert np.array_equal(rows["cls_topk_p"], -np.sort(-full[:, 1:], 1)[:, :2])
    none = rows_from_proposals(found, config.model_copy(update={"cls_probs": "none"}))
    assert not {"cls_probs", "cls_topk_idx", "bg_p"} & set(none)


@pytest.mark.parametrize("given", [True, False])
def test_no_boxes_is_a_row_of_none(given):
    rows = rows_from_proposals(_proposals(count=0, attributes=2), RegionsConfig(), given=given)
    assert rows["num_boxes"] == 0
    assert rows["boxes"].shape == (0, 4)
    assert rows["cls_probs"].shape == (0, 5)
    assert rows["attr_id"].shape == (0,)
    assert rows["image_feat"].shape == (5,)


def test_given_boxes_are_all_kept_in_their_order():
    found = _proposals(count=7)
    rows = rows_from_proposals(found, RegionsConfig(max_boxes=2, min_boxes=0, conf=0.9), given=True)
    assert np.array_equal(rows["boxes"], found.boxes.numpy())
    assert np.array_equal(rows["det_conf"], rows["obj_conf"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cls_probs": "top:3"}, "full, none or topk:K"),
        ({"cls_probs": "topk:0"}, "full, none or topk:K"),
        ({"min_boxes": 5, "max_boxes": 4}, "above `max_boxes`"),
        ({"conf": 1.5}, "less than or equal"),
    ],
)
def test_configuration_is_checked(values, message):
    with pytest.raises(ValidationError, match=message):
        RegionsConfig(**values)


def test_every_field_has_its_role():
    roles = RegionsConfig.roles()
    execution = {name for name, role in roles.items() if role == "execution"}
    assert {"device", "batch_size", "selection", "workers", "name", "weights"} <= execution
    assert {"detector", "conf", "nms", "min_boxes", "max_boxes", "box_source"}.isdisjoint(execution)
