"""VinVL's detector beside a plain restatement of scene_graph_benchmark's rules, in that project's own names.

There is no golden case: the restatement reads the same state dict and shares no code with ours.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from extractors.regions import vinvl
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from extractors.regions.protocol import find_regions
from extractors.regions.rcnn_detector import torchvision_size
from extractors.regions.selection import rows_from_proposals
from extractors.regions.vinvl import LABEL_MAP, VINVL
from schemas.errors import PairmillError
from shards.reader import MappedShard
from tests.make import make_dataset

CLASSES, ATTRIBUTES, GROUPS = 7, 5, 4
SIZE, LONGER, BEFORE, PROPOSALS = 128, 213, 300, 40
MEAN = (103.53, 116.28, 123.675)
DEEPEST = {1: 2, 2: 1, 3: 2, 4: 2}  # blocks of each layer


def picture(seed, height=96, width=131):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(noise.repeat(8, 0).repeat(8, 1)[:height, :width])


def theirs():
    """A state dict of AttrRCNN with a narrow ResNeXt: 4 groups, layers of 16 to 128 channels."""
    draw = torch.Generator().manual_seed(3)
    state = {}

    def weights(name, *shape):
        fan = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=draw) * math.sqrt(1.5 / fan)

    def norm(name, width):
        state[f"{name}.weight"] = 0.5 + torch.rand(width, generator=draw)
        state[f"{name}.bias"] = torch.randn(width, generator=draw) * 0.1
        state[f"{name}.running_mean"] = torch.randn(width, generator=draw) * 0.1
        state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=draw)

    weights("backbone.body.stem.conv1", 8, 3, 7, 7)
    norm("backbone.body.stem.bn1", 8)
    # As small as an epsilon of 1e-5 would show, and pixels brought to about 1.
    state["backbone.body.stem.bn1.running_var"][:2] = 2e-5
    state["backbone.body.stem.bn1.weight"][:2] *= 1e-3
    state["backbone.body.stem.conv1.weight"] /= 100
    into = 8
    for layer, blocks in DEEPEST.items():
        inner, out = 4 * 2**layer, 8 * 2**layer
        place = "roi_heads.box.feature_extractor.head" if layer == 4 else "backbone.body"
        for i in range(blocks):
            block = f"{place}.layer{layer}.{i}"
            for n, shape in enumerate(
                ((inner, into, 1, 1), (inner, inner // GROUPS, 3, 3), (out, inner, 1, 1)), start=1
            ):
                weights(f"{block}.conv{n}", *shape)
                norm(f"{block}.bn{n}", shape[0])
            if into != out:
                weights(f"{block}.downsample.0", out, into, 1, 1)
                norm(f"{block}.downsample.1", out)
            into = out
    linear = {"rpn.head.conv": (64, 64, 3, 3), "rpn.head.cls_logits": (15, 64, 1, 1)}
    linear |= {"rpn.head.bbox_pred": (60, 64, 1, 1), "roi_heads.box.predictor.cls_score": (CLASSES + 1, 128)}
    linear |= {"roi_heads.box.predictor.bbox_pred": (4 * (CLASSES + 1), 128)}
    linear |= {"attribute.predictor.fc_attr": (10, 132), "attribute.predictor.attr_score": (ATTRIBUTES + 1, 10)}
    for name, shape in linear.items():
        weights(name, *shape)
        state[f"{name}.bias"] = torch.randn(shape[0], generator=draw) * 0.1
    state["rpn.head.bbox_pred.weight"] *= 0.1
    # One anchor shrinks to less than a pixel; one of 64 px goes 32 times as far right and would grow beyond what the
    # coder allows, 62.5-fold, which leaves its left side in the picture. Both are found often.
    state["rpn.head.bbox_pred.bias"][2], state["rpn.head.bbox_pred.bias"][24 + 2] = -6.0, 6.0
    state["rpn.head.bbox_pred.bias"][24] = 31.5
    state["rpn.head.cls_logits.bias"][[0, 6]] += 2.0
    weights("attribute.predictor.cls_embedding", CLASSES + 1, 4)
    for name in [n for n in state if n.startswith("roi_heads.box.feature_extractor.")]:
        state[name.replace("roi_heads.box.", "attribute.")] = state[name]
    return state


STATE = theirs()


def saved(folder, state=None, name="vinvl.pth"):
    """As DetectronCheckpointer saves a model that was trained on several GPUs."""
    state = {f"module.{k}": v for k, v in (STATE if state is None else state).items()}
    torch.save({"model": state, "iteration": 5, "scheduler": {"last_epoch": 5}}, folder / name)
    return folder / name


def config(path, **options):
    return RegionsConfig(detector="vinvl", weights=str(path), **{"size": SIZE, "proposals": PROPOSALS, **options})


def anchors():
    """modeling/rpn/anchor_generator.py with stride 16 and sizes 32 to 512: ratio by ratio."""
    out = []
    for ratio in (0.5, 1.0, 2.0):
        side = round(math.sqrt(16 * 16 / ratio))
        for size in (32, 64, 128, 256, 512):
            width, height = side * size / 16, round(side * ratio) * size / 16
            out.append([7.5 - (width - 1) / 2, 7.5 - (height - 1) / 2, 7.5 + (width - 1) / 2, 7.5 + (height - 1) / 2])
    return out


def convolved(x, conv, norm, stride=1, padding=0, groups=1):
    """A convolution and FrozenBatchNorm2d, which has no epsilon."""
    x = F.conv2d(x, STATE[f"{conv}.weight"], stride=stride, padding=padding, groups=groups)
    weight, bias, mean, var = (
        STATE[f"{norm}.{p}"].view(1, -1, 1, 1) for p in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / var.sqrt() * weight + bias


def layer(x, name, blocks, stride):
    """The stride is the 3x3 convolution's (STRIDE_IN_1X1: False)."""
    for i in range(blocks):
        block, step = f"{name}.{i}", stride if i == 0 else 1
        y = convolved(x, f"{block}.conv1", f"{block}.bn1").relu()
        y = convolved(y, f"{block}.conv2", f"{block}.bn2", step, 1, GROUPS).relu()
        y = convolved(y, f"{block}.conv3", f"{block}.bn3")
        if f"{block}.downsample.0.weight" in STATE:
            x = convolved(x, f"{block}.downsample.0", f"{block}.downsample.1", step)
        x = (x + y).relu()
    return x


def moved(deltas, box, factors):
    """modeling/box_coder.py decode of one box, numbers of Python."""
    width, height = box[2] - box[0] + 1, box[3] - box[1] + 1
    x, y, w, h = (d / f for d, f in zip(deltas, factors, strict=True))
    x, y = x * width + box[0] + width / 2, y * height + box[1] + height / 2
    w, h = (math.exp(min(s, math.log(1000 / 16))) * side for s, side in ((w, width), (h, height)))
    return [x - w / 2, y - h / 2, x + w / 2 - 1, y + h / 2 - 1]


def clipped(box, height, width):
    """structures/bounding_box.py clip_to_image."""
    return [min(max(v, 0), (width, height)[i % 2] - 1) for i, v in enumerate(box)]


def survivors(boxes, scores, threshold):
    """torchvision's nms: widths without a pixel more, overlaps above the threshold."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        a = boxes[i]
        for j in kept:
            b = boxes[j]
            shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
            if areas != shared and shared / (areas - shared) > threshold:
                break
        else:
            kept.append(i)
    return kept


def samples(start, length, extent):
    """[14 x n, extent]: how RoIAlign's sampling points along one side weigh the cells; n = ceil(length / 14)."""
    count = math.ceil(length / 14)
    out = torch.zeros(14 * count, extent)
    for i in range(14 * count):
        at = start + (i + 0.5) * length / 14 / count
        if not -1 <= at <= extent:
            continue
        at = min(max(at, 0), extent - 1)
        low = min(int(at), extent - 1)
        out[i, low] += 1 - (at - low)
        if low + 1 < extent:
            out[i, low + 1] += at - low
    return out.view(14, count, extent).mean(1)


def cells(x, box):
    """csrc/cpu/ROIAlign_cpu.cpp at 1/16, sampling ratio 0: no half cell less, boxes of one cell at least."""
    x1, y1, x2, y2 = (v / 16 for v in box)
    rows = samples(y1, max(y2 - y1, 1), x.shape[1])
    columns = samples(x1, max(x2 - x1, 1), x.shape[2])
    return rows @ x @ columns.T


def restated(rgb):
    """(boxes, refined boxes, features, class and attribute probabilities) of one picture, a batch of one."""
    height, width = rgb.shape[:2]
    short = SIZE
    if max(height, width) / min(height, width) * short > LONGER:
        short = round(LONGER * min(height, width) / max(height, width))
    new = (int(short * height / width), short) if width < height else (short, int(short * width / height))
    small = Image.fromarray(rgb).resize(new[::-1], Image.BILINEAR)
    x = torch.from_numpy(np.array(small, np.float32)[:, :, ::-1] - np.array(MEAN, np.float32)).permute(2, 0, 1)[None]
    x = convolved(x, "backbone.body.stem.conv1", "backbone.body.stem.bn1", 2, 3).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for n in (1, 2, 3):
        x = layer(x, f"backbone.body.layer{n}", DEEPEST[n], 1 if n == 1 else 2)

    def head(name, x, padding=0):
        return F.conv2d(x, STATE[f"{name}.weight"], STATE[f"{name}.bias"], padding=padding)

    seen = head("rpn.head.conv", x, 1).relu()
    scores = head("rpn.head.cls_logits", seen)[0].sigmoid().permute(1, 2, 0).flatten().tolist()
    deltas = head("rpn.head.bbox_pred", seen)[0].permute(1, 2, 0).reshape(-1, 4).tolist()
    cell = anchors()
    at = [(row, column, a) for row in range(x.shape[2]) for column in range(x.shape[3]) for a in cell]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:BEFORE]
    boxes = []
    for i in best:
        row, column, a = at[i]
        shifted = [v + 16 * (row if k % 2 else column) for k, v in enumerate(a)]
        boxes.append(clipped(moved(deltas[i], shifted, (1, 1, 1, 1)), *new))
    boxes = [b for b in boxes if b[2] - b[0] + 1 >= 0 and b[3] - b[1] + 1 >= 0]
    boxes = [boxes[i] for i in survivors(boxes, list(range(len(boxes), 0, -1)), 0.7)[:PROPOSALS]]

    pooled = torch.stack([cells(x[0], b) for b in boxes])
    features = layer(pooled, "roi_heads.box.feature_extractor.head.layer4", DEEPEST[4], 2).mean((2, 3))

    def full(name, x):
        return F.linear(x, STATE[f"{name}.weight"], STATE[f"{name}.bias"])

    probs = full("roi_heads.box.predictor.cls_score", features).softmax(1)
    labels = probs[:, 1:].argmax(1) + 1
    told = torch.cat([features, STATE["attribute.predictor.cls_embedding.weight"][labels]], 1)
    attributes = full("attribute.predictor.attr_score", full("attribute.predictor.fc_attr", told).relu()).softmax(1)
    moves = full("roi_heads.box.predictor.bbox_pred", features).view(len(boxes), -1, 4)
    own = moves[torch.arange(len(boxes)), labels].tolist()
    refined = [clipped(moved(m, b, (10, 10, 5, 5)), *new) for m, b in zip(own, boxes, strict=True)]
    back = torch.tensor([width / new[1], height / new[0]] * 2)
    return torch.tensor(boxes) * back, torch.tensor(refined) * back, features, probs, attributes


def spread_classes():
    """Random features all point one way: the scores of one picture's boxes are set about 0, so that classes differ."""
    features, score = restated(picture(0))[2], "roi_heads.box.predictor.cls_score"
    STATE[f"{score}.weight"] *= 5
    STATE[f"{score}.bias"] = -STATE[f"{score}.weight"] @ features.mean(0)


spread_classes()


@pytest.fixture
def detector(tmp_path, monkeypatch):
    monkeypatch.setattr(vinvl, "VINVL", replace(VINVL, before_nms=BEFORE))
    return load_detector(config(saved(tmp_path)))


@pytest.mark.parametrize(("height", "width"), [(96, 131), (131, 96), (60, 150), (256, 128), (300, 41)])
def test_an_image_has_the_restated_rows(detector, height, width):
    image = picture(height, height, width)
    (found,) = find_regions(detector, [image])
    boxes, refined, features, probs, attributes = restated(image)
    assert len(boxes) > 10
    assert found.boxes.shape == boxes.shape
    assert torch.allclose(found.boxes, boxes, atol=2e-3)
    assert torch.allclose(found.regressed, refined, atol=5e-3)
    assert torch.allclose(found.features, features, atol=1e-4, rtol=1e-3)
    assert torch.allclose(found.class_probs, probs, atol=1e-4)
    assert torch.allclose(found.attribute_probs, attributes, atol=1e-4)


def test_the_restated_pictures_have_what_is_rare(detector):
    """Boxes whose corners are swapped, boxes that grew to the limit, classes led by the background."""
    found = find_regions(detector, [picture(n, 96, 131) for n in range(4)])
    boxes = torch.cat([f.boxes for f in found])
    assert (boxes[:, 2] < boxes[:, 0]).any()
    assert (boxes[:, 2] - boxes[:, 0] > 100).any()
    likeliest = torch.cat([f.class_probs for f in found]).argmax(1)
    assert likeliest.eq(0).any()
    assert len(likeliest.unique()) > 3


def test_boxes_are_kept_as_filter_results_peter_keeps_them(detector):
    """roi_heads/box_head/inference.py, NMS_FILTER 1, SCORE_THRESH 0.2, 10 to 100 boxes."""
    image = picture(7)
    boxes, _, features, probs, _ = restated(image)
    best = torch.zeros(len(boxes))
    for label in range(1, CLASSES + 1):
        kept = survivors(boxes.tolist(), probs[:, label].tolist(), 0.3)
        best[kept] = torch.maximum(best[kept], probs[kept, label])
    order = best.argsort(descending=True, stable=True)
    count = min(100, max(10, int((best >= 0.2).sum())))
    (found,) = find_regions(detector, [image])
    row = rows_from_proposals(found, config("unused"), inclusive=detector.inclusive)
    assert row["num_boxes"] == count
    assert np.allclose(row["det_conf"], best[order[:count]], atol=1e-4)
    assert np.allclose(row["features"], features[order[:count]], atol=2e-3, rtol=2e-3)


def test_sizes_are_those_of_get_size():
    """data/transforms/transforms.py at 600 and 1000 px, worked by hand."""
    sizes = {(480, 640): (600, 800), (427, 640): (600, 899), (500, 333): (900, 600), (500, 500): (600, 600)}
    sizes |= {(600, 800): (600, 800), (300, 500): (600, 1000), (410, 3000): (137, 1002), (3000, 410): (1002, 137)}
    sizes |= {(1, 1): (600, 600), (10, 20000): (1, 1000), (20000, 10): (1000, 1)}
    assert {size: torchvision_size(*size, VINVL) for size in sizes} == sizes


def test_rows_depend_on_no_other_image(detector):
    images = [picture(0), picture(1, 60, 150), picture(2), np.zeros((1, 1, 3), np.uint8), picture(3, 20000, 10)]
    together = find_regions(detector, images)
    for image, found in zip(images, together, strict=True):
        (alone,) = find_regions(detector, [image])
        height, width = image.shape[:2]
        assert torch.isfinite(found.features).all()
        assert torch.isfinite(found.image_feature).all()
        assert found.boxes.shape == alone.boxes.shape
        assert torch.allclose(found.boxes, alone.boxes, atol=1e-2)
        assert torch.allclose(found.features, alone.features, atol=1e-3, rtol=1e-3)
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height] * 2) + 1e-3).all()


def test_proposals_that_are_given_back_get_their_features(detector):
    images = [picture(4), picture(5, 70, 70)]
    proposed = find_regions(detector, images)
    for a, b in zip(proposed, find_regions(detector, images, [p.boxes for p in proposed]), strict=True):
        assert torch.allclose(a.features, b.features, atol=1e-3, rtol=1e-2)
        assert b.regressed is None


def test_anchors_that_a_file_brings_are_taken(tmp_path, detector):
    """A checkpoint of theirs holds them as a buffer."""
    (found,) = find_regions(detector, [picture(6)])
    for shift, same in ((0, True), (3, False)):
        brought = {**STATE, "rpn.anchor_generator.cell_anchors.0": torch.tensor(anchors()) + shift}
        (again,) = find_regions(load_detector(config(saved(tmp_path, brought))), [picture(6)])
        assert torch.equal(found.boxes, again.boxes) is same


def names_of(count, word):
    """From 1 on, as the published label map has them, and in no order."""
    return {f"{word} {i}": i for i in reversed(range(1, count + 1))}


@pytest.mark.parametrize("beside", [LABEL_MAP, "vinvl.json"])
def test_extraction_stores_names_and_attributes(tmp_path, beside):
    path = saved(tmp_path)
    assert load_detector(config(path)).classes[:2] == ("class_0", "class_1")
    told = {"label_to_idx": names_of(CLASSES, "thing"), "attribute_to_idx": {"__no_attribute__": 0}}
    told["attribute_to_idx"] |= names_of(ATTRIBUTES, "kind")
    (tmp_path / beside).write_text(json.dumps(told))
    dataset = make_dataset(tmp_path / "ds", shards=1, rows=2)
    extract_regions(dataset, config(path, workers=0, min_boxes=3, max_boxes=9))
    mapped = MappedShard(dataset.folder, dataset.stage("features/regions").file(0))
    about = json.loads(mapped.schema.metadata[b"pairmill.about"])
    assert about["classes"] == [f"thing {i}" for i in range(1, CLASSES + 1)]
    assert about["attributes"] == [f"kind {i}" for i in range(1, ATTRIBUTES + 1)]
    row = mapped.row(0)
    assert row["state"] == "ok"
    assert 3 <= row["num_boxes"] <= 9
    assert len(row["attr_id"]) == row["num_boxes"]
    assert row["features"].shape == (row["num_boxes"], 128)


def test_a_detector_without_attributes_loads(tmp_path):
    state = {k: v for k, v in STATE.items() if not k.startswith("attribute.")}
    plain = load_detector(config(saved(tmp_path, state)))
    assert plain.attributes == ()
    (found,) = find_regions(plain, [picture(1)])
    assert found.attribute_probs is None


def test_what_is_wrong_with_weights_is_said(tmp_path):
    with pytest.raises(PairmillError, match=r"needs weights.*vinvl_vg_x152c4.pth"):
        load_detector(RegionsConfig(detector="vinvl"))
    with pytest.raises(PairmillError, match="no such backend"):
        load_detector(RegionsConfig(detector="vinvl:x152c4"))
    other = saved(tmp_path, {"layer1.weight": torch.zeros(2, 2)})
    with pytest.raises(PairmillError, match=r"it has no `roi_heads.box.*layer4.*first names are layer1.weight"):
        load_detector(config(other))
    changed = {**STATE, "roi_heads.extra.weight": torch.zeros(1)}
    del changed["backbone.body.layer2.0.bn2.bias"]
    wrong = r"1 missing: backbone.res3.0.conv2.norm.bias; 1 unexpected: roi_heads.extra"
    with pytest.raises(PairmillError, match=wrong):
        load_detector(config(saved(tmp_path, changed)))
    own = {**STATE, "attribute.feature_extractor.head.layer4.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    with pytest.raises(PairmillError, match=r"attribute head pools features of its own"):
        load_detector(config(saved(tmp_path, own)))


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ({"label_to_idx": names_of(3, "thing")}, r"names 3 classes, `vinvl.pth` has 7"),
        ({"label_to_idx": {"thing": "one"}}, r"has no `label_to_idx` from names to numbers"),
        ({"label_to_idx": names_of(CLASSES, "thing")}, r"has no `attribute_to_idx`"),
    ],
)
def test_what_is_wrong_with_a_label_map_is_said(tmp_path, told, wrong):
    (tmp_path / LABEL_MAP).write_text(json.dumps(told))
    with pytest.raises(PairmillError, match=wrong):
        load_detector(config(saved(tmp_path)))
