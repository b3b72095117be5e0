"""Boxes and labels: where they are, that they can be read, that they keep off each other."""

import numpy as np
import pytest

from extractors.regions.draw import draw_regions, region_labels

GREY = np.full((200, 300, 3), 128, np.uint8)


def _changed(before, after):
    """Rows and columns of the pixels that differ."""
    rows, columns = np.nonzero((before.astype(int) != after).any(-1))
    return rows, columns


def test_without_boxes_the_picture_stays():
    drawn = draw_regions(GREY, np.zeros((0, 4), np.float32), [], [], side_px=300)
    assert np.array_equal(drawn, GREY)


def test_small_pictures_grow_and_large_ones_stay():
    assert draw_regions(GREY[:50, :100], np.zeros((0, 4)), [], [], side_px=400).shape == (200, 400, 3)
    assert draw_regions(GREY, np.zeros((0, 4)), [], [], side_px=100).shape == GREY.shape


def test_box_is_drawn_where_it_is():
    drawn = draw_regions(GREY, np.array([[100, 80, 160, 140]]), ["cat"], [0.9], side_px=300)
    edge = drawn[110, 100]
    assert not np.array_equal(edge, [128, 128, 128])
    assert np.array_equal(drawn[110, 130], [128, 128, 128])
    assert np.array_equal(drawn[139, 130], edge)
    rows, columns = _changed(GREY, drawn)
    assert rows.max() <= 141
    assert columns.min() >= 98


def test_image_is_not_changed_in_place():
    before = GREY.copy()
    draw_regions(GREY, np.array([[10, 10, 50, 50]]), ["cat"], [0.5])
    assert np.array_equal(GREY, before)


@pytest.mark.parametrize(
    "box", [[0, 0, 300, 200], [0, 0, 4, 4], [296, 196, 300, 200], [150, 100, 150, 100], [-20, -20, 400, 300]]
)
def test_boxes_at_the_border_keep_their_label_inside(box):
    drawn = draw_regions(GREY, np.array([box], np.float32), ["a long class name"], [0.25], side_px=300)
    assert drawn.shape == GREY.shape
    assert (drawn == 255).all(-1).sum() > 60


def test_labels_of_one_spot_do_not_hide_each_other(monkeypatch):
    from extractors.regions import draw

    spots = []
    place = draw._place
    monkeypatch.setattr(draw, "_place", lambda *a: spots.append(place(*a)) or spots[-1])
    boxes = np.array([[100, 80, 200, 150]] * 5, np.float32) + np.arange(5)[:, None]
    draw_regions(GREY, boxes, [f"square {i}" for i in range(5)], [0.9, 0.8, 0.7, 0.6, 0.5], side_px=300)
    assert len(spots) == 5
    shared = [draw._shared(a, b) for i, a in enumerate(spots) for b in spots[:i]]
    assert max(shared) == 0


def test_only_the_most_confident_boxes_are_drawn():
    boxes = np.array([[10, 60, 60, 110], [200, 60, 250, 110]], np.float32)
    drawn = draw_regions(GREY, boxes, ["a", "b"], [0.3, 0.6], max_boxes=1, side_px=300)
    _, columns = _changed(GREY, drawn)
    assert columns.min() > 150


def test_boxes_below_the_confidence_are_not_drawn():
    boxes = np.array([[10, 60, 60, 110], [200, 60, 250, 110]], np.float32)
    drawn = draw_regions(GREY, boxes, ["a", "b"], [0.3, 0.1], min_confidence=0.2, side_px=300)
    _, columns = _changed(GREY, drawn)
    assert columns.max() < 150


def test_a_name_is_drawn_once_on_one_spot():
    boxes = np.array([[100, 60, 160, 120], [102, 62, 162, 122], [20, 60, 80, 120]], np.float32)
    one = draw_regions(GREY, boxes[[0, 2]], ["a", "a"], [0.9, 0.7], side_px=300)
    assert np.array_equal(draw_regions(GREY, boxes, ["a", "a", "a"], [0.9, 0.8, 0.7], side_px=300), one)
    other = draw_regions(GREY, boxes, ["a", "b", "a"], [0.9, 0.8, 0.7], side_px=300)
    assert not np.array_equal(other, one)


def test_a_name_has_one_colour():
    boxes = np.array([[10, 60, 60, 110], [200, 60, 250, 110]], np.float32)
    drawn = draw_regions(GREY, boxes, ["cat", "cat"], [0.3, 0.6], side_px=300)
    assert np.array_equal(drawn[80, 10], drawn[80, 200])


def test_labels_with_and_without_attributes():
    assert region_labels([1, 0], ["car", "dog"]) == ["dog", "car"]
    assert region_labels([1, 0], ["car", "dog"], [2, 0], ["red", "big", "old"]) == ["old dog", "red car"]
