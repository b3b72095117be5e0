"""Boxes and labels: where they are, that they can be read, that they keep off each other."""

import numpy as np
import pytest
import torch

from cli.demo.scenes import generate_scene
from extractors.regions import draw
from extractors.regions.config import RegionsConfig
from extractors.regions.draw import draw_regions, region_labels, row_regions
from extractors.regions.extractor import extract_regions
from extractors.regions.picture import draw_row
from extractors.regions.protocol import Proposals
from tests.make import make_dataset

GREY = np.full((200, 300, 3), 128, np.uint8)


def tags(monkeypatch):
    """Fills with (tag, where it stands) of all that is drawn from now on."""
    written = []
    write = draw._write
    monkeypatch.setattr(draw, "_write", lambda *a: written.append(a[2:4]) or write(*a))
    return written


def hidden(written):
    """Square px that the tags hide of each other."""
    return sum(draw._shared(a, b) for i, (_, a) in enumerate(written) for _, b in written[:i])


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
    written = tags(monkeypatch)
    boxes = np.array([[100, 80, 200, 150]] * 5, np.float32) + np.arange(5)[:, None]
    draw_regions(GREY, boxes, [f"square {i}" for i in range(5)], [0.9, 0.8, 0.7, 0.6, 0.5], side_px=300)
    assert len(written) == 5
    assert hidden(written) == 0


@pytest.mark.parametrize("seed", range(6))
def test_labels_of_a_crowd_do_not_hide_each_other(monkeypatch, seed):
    """24 boxes with long names about two spots of a small picture."""
    written = tags(monkeypatch)
    rng = np.random.default_rng(seed)
    middles = rng.uniform(120, 180, (24, 2))
    boxes = np.concatenate([middles - rng.uniform(5, 50, (24, 2)), middles + rng.uniform(5, 50, (24, 2))], 1)
    names = [f"multi-colored umbrella {i}" for i in range(24)]
    draw_regions(np.zeros((300, 300, 3), np.uint8), boxes, names, np.linspace(0.9, 0.3, 24).tolist())
    assert len(written) == 24
    assert hidden(written) == 0
    assert all(min(x1, y1) >= 0 and max(x2, y2) <= 640 for _, (x1, y1, x2, y2) in written)


@pytest.mark.parametrize("size", [(600, 60), (2000, 12), (12, 2000)])
def test_a_name_wider_than_the_picture_is_cut(monkeypatch, size):
    written = tags(monkeypatch)
    drawn = draw_regions(np.full((*size, 3), 128, np.uint8), np.array([[0, 0, 9, 9]]), ["a multi-colored name"], [0.5])
    (tag, spot), height = written[0], drawn.shape[0]
    assert tag.text.endswith(" 0.50")
    assert ("..." in tag.text) is (size[1] < 200)
    assert spot[0] >= 0
    assert spot[1] >= 0
    assert tag.height <= max(17, height // 8)


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


def test_names_of_one_picture_differ_in_colour():
    names = [f"name {i}" for i in range(20)]
    assert len(set(draw._colours(names).values())) == 20
    assert draw._colours(names[:1]) == {"name 0": draw._colours(["name 0", "name 7"])["name 0"]}
    many = list(draw._colours(f"name {i}" for i in range(60)).values())
    assert {many.count(colour) for colour in many} == {3}


class Genome:
    """A detector of 1600 classes and 400 attributes that finds 60 boxes anywhere."""

    classes = tuple(f"thing {i}" for i in range(1600))
    attributes = tuple(f"kind {i}" for i in range(400))
    feature_dim, fingerprint, inclusive = 4, "genome", False

    def prepare(self, rgb):
        return torch.from_numpy(rgb).permute(2, 0, 1)

    def key(self, height, width):
        return height, width

    def to(self, device):
        return self

    def propose(self, images, sizes):
        return [self._found(height, width) for height, width in sizes]

    def _found(self, height, width):
        rng = torch.Generator().manual_seed(height)
        start = torch.rand(60, 2, generator=rng) * torch.tensor([width * 0.7, height * 0.7])
        end = start + (0.05 + 0.25 * torch.rand(60, 2, generator=rng)) * torch.tensor([width, height])
        classes, kinds = torch.randn(60, 1601, generator=rng), torch.randn(60, 401, generator=rng)
        return Proposals(
            boxes=torch.cat([start, end], 1),
            features=torch.zeros(60, 4),
            class_probs=(classes * 3).softmax(1),
            image_feature=torch.zeros(4),
            attribute_probs=kinds.softmax(1),
        )


def test_a_stored_row_of_many_classes_is_drawn_with_attributes(tmp_path, monkeypatch):
    monkeypatch.setattr("extractors.regions.extractor.load_detector", lambda config: Genome())
    dataset = make_dataset(tmp_path / "ds", rows=1, image=lambda *_: generate_scene(4, (300, 400)).image)
    extract_regions(dataset, RegionsConfig(workers=0, device="cpu", min_boxes=36, max_boxes=36))
    written = tags(monkeypatch)
    assert draw_row(str(tmp_path / "ds"), "0", "regions", tmp_path / "boxes.png", 0.0) == 36
    assert len(written) == 24
    assert hidden(written) == 0
    assert all(tag.text.startswith("kind ") and " thing " in tag.text for tag, _ in written)
    assert (tmp_path / "boxes.png").stat().st_size > 10_000


def test_what_an_imported_row_lacks():
    """Without confidences a box counts as sure, without ids it has no name, without boxes there is nothing to draw."""
    box = [[1.0, 2, 30, 40]]
    boxes, labels, confidence = row_regions({"boxes": box, "det_conf": None}, {})
    assert (boxes.tolist(), labels, confidence.tolist()) == (box, [""], [1.0])
    assert row_regions({"boxes": None}, {})[0].shape == (0, 4)
    found = {"boxes": box, "det_conf": [0.5], "obj_id": [1], "attr_id": [0]}
    _, labels, confidence = row_regions(found, {"classes": ["dog", "car"], "attributes": ["red"]})
    assert (labels, confidence.tolist()) == (["red car"], [0.5])
    plain = np.full((60, 60, 3), 255, np.uint8)
    assert (draw_regions(plain, boxes, [""], [1.0], side_px=60) != 255).any()
