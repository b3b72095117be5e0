"""detectron2's models as detectors, and ours beside them on the same weights. Most tests need detectron2 installed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import batched_nms

from extractors.regions.backends import load_detector
from extractors.regions.butd import read_butd
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from extractors.regions.protocol import find_regions
from extractors.regions.rcnn import FasterRcnn
from extractors.regions.rcnn_detector import C4, FPN, build, network_input
from extractors.regions.selection import rows_from_proposals
from schemas.errors import PairmillError
from shards.reader import MappedShard
from tests.extractors.test_regions_butd import picture
from tests.make import make_dataset
from tests.parity.golden import golden

CLASSES = 7
OPTIONS = {"size": 112, "proposals": 40}
WIDTHS = """
  RESNETS: {DEPTH: 50, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4}
  FPN: {OUT_CHANNELS: 8}
  ROI_BOX_HEAD: {FC_DIM: 24}
"""
# As airsplay's fork of detectron2 has it (butd.md 6.1): what the settings can say, and `as_airsplay` does the rest.
AIRSPLAY = """
  RESNETS: {DEPTH: 50, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4}
  PIXEL_MEAN: [102.9801, 115.9465, 122.7717]
  ANCHOR_GENERATOR: {SIZES: [[64, 128, 256, 512]]}
  RPN: {CONV_DIMS: [20]}
  ROI_BOX_HEAD: {POOLER_TYPE: ROIPool}
"""
# height, width: odd, tall, 2 px, and so long that the network sees a side of 3 or of 1 px
SHAPES = ((96, 130), (160, 77), (2, 2), (3, 200), (220, 1))


@pytest.fixture
def needs_detectron2():
    pytest.importorskip("detectron2")


def settings(folder, base="Base-RCNN-C4.yaml", model=WIDTHS, classes=CLASSES, rest=""):
    """A .yaml of a small model on top of one of the zoo's."""
    import detectron2

    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs" / base
    path = folder / "small.yaml"
    path.write_text(f"_BASE_: {zoo}\nMODEL:{model}  ROI_HEADS: {{NUM_CLASSES: {classes}}}\n{rest}")
    return path


def config(yaml, weights=None, **options):
    return RegionsConfig(
        detector=f"detectron2:{yaml}", weights=None if weights is None else str(weights), **{**OPTIONS, **options}
    )


def settled(folder, yaml):
    """Random weights whose numbers mean something, as the zoo's file."""
    from benchmarks.detectron2_parity import random_weights

    seen = torch.from_numpy(np.ascontiguousarray(picture(99, 112, 150).transpose(2, 0, 1)))
    return random_weights(config(yaml), seen, folder / "small.pkl")


def check_equal(ours, theirs, px=2e-3, near=1e-4):
    """Every proposal, to `px` pixels or `near` of its numbers."""
    assert len(ours.boxes) == len(theirs.boxes) > 0
    assert torch.allclose(ours.boxes, theirs.boxes, atol=px)
    assert torch.allclose(ours.regressed, theirs.regressed, atol=px)
    assert torch.allclose(ours.features, theirs.features, rtol=near, atol=near)
    assert torch.allclose(ours.class_probs, theirs.class_probs, atol=near)
    assert torch.allclose(ours.image_feature, theirs.image_feature, rtol=near, atol=near)


def check_kept(ours, theirs):
    """What the rule of selection keeps."""
    for source in ("proposal", "regressed"):
        rule = RegionsConfig(box_source=source, conf=0.3, min_boxes=3)
        kept, wanted = (rows_from_proposals(p, rule) for p in (ours, theirs))
        assert kept["num_boxes"] == wanted["num_boxes"]
        assert np.allclose(kept["boxes"], wanted["boxes"], atol=2e-3)
        assert kept["obj_id"].tolist() == wanted["obj_id"].tolist()
        assert np.allclose(kept["det_conf"], wanted["det_conf"], atol=1e-4)


def as_airsplay(model):
    """Caffe's pooling in the stem, and a last stage that keeps its 14 x 14 cells."""
    stem, res5 = model.backbone.stem, model.roi_heads.res5
    stem.forward = lambda x: F.max_pool2d(F.relu_(stem.conv1(x)), 3, 2, 0, ceil_mode=True)
    res5[0].conv1.stride = res5[0].shortcut.stride = (1, 1)
    for block in res5:
        block.conv2.dilation = block.conv2.padding = (2, 2)


@pytest.mark.parametrize(
    ("base", "own"),
    [
        ("Base-RCNN-C4.yaml", "rcnn:C4"),
        ("Base-RCNN-FPN.yaml", "rcnn:FPN"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", "rcnn:C4"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "rcnn:FPN"),
    ],
)
@pytest.mark.usefixtures("needs_detectron2")
def test_our_detectors_find_what_detectron2_finds(tmp_path, monkeypatch, base, own):
    yaml = settings(tmp_path, base)
    weights = settled(tmp_path, yaml)
    theirs, folded = load_detector(config(yaml, weights)), load_detector(_own(own, weights))
    monkeypatch.setattr(FasterRcnn, "fold", lambda self: self)  # rounding that 50 thin layers would magnify
    ours = load_detector(_own(own, weights))
    assert theirs.feature_dim == ours.feature_dim
    for seed, shape in enumerate(SHAPES):
        image = picture(seed, *shape)
        found, want = find_regions(ours, [image])[0], find_regions(theirs, [image])[0]
        check_equal(found, want)
        check_kept(found, want)
        height, width = shape
        boxes = torch.tensor([[0.0, 0.0, width, height], [0.1, 0.2, width / 2, height / 2]])
        a, b, c = (find_regions(detector, [image], [boxes])[0] for detector in (ours, theirs, folded))
        assert torch.allclose(b.boxes, boxes, atol=1e-4)
        assert b.regressed is None
        assert torch.allclose(a.features, b.features, rtol=1e-4, atol=1e-4)
        assert torch.allclose(c.features, b.features, rtol=1e-2, atol=1e-2)
        assert torch.allclose(b.features[0], b.image_feature, rtol=1e-4, atol=1e-4)


def _own(detector, weights):
    return RegionsConfig(detector=detector, weights=str(weights), **OPTIONS)


@pytest.mark.usefixtures("needs_detectron2")
def test_bottom_up_attention_of_airsplays_form_is_detectron2_with_caffes_last_stage(tmp_path, monkeypatch):
    yaml = settings(tmp_path, model=AIRSPLAY)
    weights = settled(tmp_path, yaml)
    monkeypatch.setattr(FasterRcnn, "fold", lambda self: self)
    theirs, ours = load_detector(config(yaml, weights)), load_detector(_own("butd:airsplay", weights))
    as_airsplay(theirs.model)
    for seed, shape in enumerate(SHAPES[:4]):
        image = picture(seed, *shape)
        found, want = find_regions(ours, [image])[0], find_regions(theirs, [image])[0]
        check_equal(found, want)
        check_kept(found, want)


@pytest.mark.parametrize("base", ["Base-RCNN-C4.yaml", "Base-RCNN-FPN.yaml"])
@pytest.mark.usefixtures("needs_detectron2")
def test_the_predictors_detections_follow_from_our_parts(tmp_path, base):
    """With a threshold of a half a box is detected as its likeliest class only, whose refined box we have."""
    from benchmarks.detectron2_parity import predictor

    threshold = "TEST: {DETECTIONS_PER_IMAGE: 1000}\n"
    yaml = settings(tmp_path, base, rest=threshold)
    yaml.write_text(yaml.read_text().replace("NUM_CLASSES: 7", "NUM_CLASSES: 7, SCORE_THRESH_TEST: 0.5"))
    weights = settled(tmp_path, yaml)
    detector, whole = load_detector(config(yaml, weights)), predictor(config(yaml, weights))
    for seed, shape in enumerate(SHAPES[:2]):
        image = picture(seed, *shape)
        want = whole(image[:, :, ::-1])["instances"]
        found = find_regions(detector, [image])[0]
        scores, labels = found.class_probs[:, 1:].max(1)
        rows = (scores > 0.5).nonzero()[:, 0]
        rows = rows[batched_nms(found.regressed[rows], scores[rows], labels[rows], 0.5)]
        assert len(rows) == len(want) > 3
        assert torch.allclose(found.regressed[rows], want.pred_boxes.tensor, atol=1e-3)
        assert torch.allclose(scores[rows], want.scores, atol=1e-5)
        assert labels[rows].tolist() == want.pred_classes.tolist()


@pytest.mark.parametrize("base", ["Base-RCNN-C4.yaml", "Base-RCNN-FPN.yaml"])
@pytest.mark.usefixtures("needs_detectron2")
def test_an_image_does_not_depend_on_its_neighbours(tmp_path, base):
    yaml = settings(tmp_path, base)
    detector = load_detector(config(yaml, settled(tmp_path, yaml)))
    images = [picture(seed, *shape) for seed, shape in enumerate([(96, 130), (96, 128), (130, 96), (96, 130)])]
    keys = {detector.key(*image.shape[:2]) for image in images}
    assert len(keys) == (2 if "FPN" in base else 3)
    for one, image in zip(find_regions(detector, images), images, strict=True):
        alone = find_regions(detector, [image])[0]
        assert torch.allclose(one.boxes, alone.boxes, atol=1e-2)
        assert torch.allclose(one.features, alone.features, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("needs_detectron2")
def test_extraction_stores_regions_with_the_names_of_the_data(tmp_path):
    yaml = settings(tmp_path, "Base-RCNN-FPN.yaml", classes=80)
    weights = settled(tmp_path, yaml)
    dataset = make_dataset(tmp_path / "ds", shards=1, rows=2)
    extract_regions(dataset, config(yaml, weights, workers=0, min_boxes=3, max_boxes=9))
    stage = dataset.stage("features/regions")
    assert stage.sidecar().versions["detectron2"]
    mapped = MappedShard(dataset.folder, stage.file(0))
    assert mapped.row(0)["state"] == "ok"
    assert 3 <= mapped.row(0)["num_boxes"] <= 9
    assert b"bicycle" in mapped.schema.metadata[b"pairmill.about"]


@pytest.mark.usefixtures("needs_detectron2")
def test_size_and_proposals_are_the_configurations_where_not_given(tmp_path):
    yaml = settings(tmp_path, rest="INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 90}\n")
    yaml.write_text(yaml.read_text().replace("  ROI_HEADS", "  RPN: {POST_NMS_TOPK_TEST: 5}\n  ROI_HEADS"))
    weights = settled(tmp_path, yaml)
    own = load_detector(config(yaml, weights, size=None, proposals=None))
    assert own.key(100, 100) == (64, 64)
    assert own.key(100, 200) == (45, 90)
    assert len(find_regions(own, [picture(0)])[0].boxes) == 5
    given = load_detector(config(yaml, weights))
    assert given.key(100, 400) == (47, 186)
    prints = {own.fingerprint, given.fingerprint, load_detector(config(yaml, weights, proposals=6)).fingerprint}
    assert len(prints) == 3
    yaml.write_text(yaml.read_text().replace("MIN_SIZE_TEST: 64", "MIN_SIZE_TEST: 0"))
    assert load_detector(config(yaml, weights, size=None)).key(100, 400) == (100, 400)


@pytest.mark.usefixtures("needs_detectron2")
def test_colours_are_given_in_the_configurations_order(tmp_path):
    yaml = settings(tmp_path)
    weights = settled(tmp_path, yaml)
    bgr = load_detector(config(yaml, weights)).prepare(picture(0))
    yaml.write_text(f"{yaml.read_text()}INPUT: {{FORMAT: RGB}}\n")
    assert torch.equal(load_detector(config(yaml, weights)).prepare(picture(0)), bgr.flip(0))


@pytest.mark.usefixtures("needs_detectron2")
def test_one_refined_box_for_all_classes(tmp_path):
    model = WIDTHS.replace("ROI_BOX_HEAD: {", "ROI_BOX_HEAD: {CLS_AGNOSTIC_BBOX_REG: true, ")
    yaml = settings(tmp_path, model=model)
    found = find_regions(load_detector(config(yaml, settled(tmp_path, yaml))), [picture(0)])[0]
    assert found.regressed.shape == found.boxes.shape
    assert (found.regressed - found.boxes).abs().max() > 1


@pytest.mark.usefixtures("needs_detectron2")
def test_names_of_classes_come_from_the_weights_folder_or_the_data(tmp_path):
    yaml = settings(tmp_path, rest="DATASETS: {TEST: [nobodys, coco_2017_val]}\n")
    weights = settled(tmp_path, yaml)
    assert load_detector(config(yaml, weights)).classes == tuple(f"class_{i}" for i in range(CLASSES))
    (tmp_path / "objects_vocab.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    assert load_detector(config(yaml, weights)).classes == tuple("abcdefg")
    (tmp_path / "coco").mkdir()
    yaml = settings(tmp_path / "coco", classes=80)
    detector = load_detector(config(yaml, settled(tmp_path / "coco", yaml), cls_probs="topk:80"))
    assert detector.classes[:2] == ("person", "bicycle")
    with pytest.raises(PairmillError, match="knows 7 classes only"):
        load_detector(config(settings(tmp_path), weights, cls_probs="topk:8"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("COCO-Detection/faster_rcnn_R_50_C4_2x.yaml", "Did you mean `COCO-Detection/faster_rcnn_R_50_C4_.x.yaml`"),
        ("common/models/mask_rcnn_fpn.py", "is a program"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "no configuration that detectron2 reads .ConstructorError"),
        ("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", "taken of GeneralizedRCNN with an RPN"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "is a GeneralizedRCNN with CascadeROIHeads"),
    ],
)
@pytest.mark.usefixtures("needs_detectron2")
def test_a_configuration_that_is_not_taken(tmp_path, name, message):
    weights = tmp_path / "any.pkl"
    weights.write_bytes(pickle.dumps({"model": {"a.weight": np.zeros(1, np.float32)}}))
    with pytest.raises(PairmillError, match=message):
        load_detector(config(name, weights))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {NO_SUCH: 1}\n", "no configuration that detectron2 reads"),
        ("MODEL: {ROI_HEADS: {NAME: Own}}\n", "detectron2 cannot build it"),
        ("MODEL: {MASK_ON: !!python/object/apply:os.mkdir [%s]}\n", "no configuration that detectron2 reads"),
    ],
)
@pytest.mark.usefixtures("needs_detectron2")
def test_a_strangers_configuration_is_refused_and_nothing_of_it_executed(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text.replace("%s", str(tmp_path / "made")))
    (tmp_path / "any.pkl").write_bytes(b"x")
    with pytest.raises(PairmillError, match=message):
        load_detector(config(tmp_path / "own.yaml", tmp_path / "any.pkl"))
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("needs_detectron2")
def test_weights_that_do_not_fit_are_refused(tmp_path):
    yaml = settings(tmp_path)
    with pytest.raises(PairmillError, match="needs weights"):
        load_detector(config(yaml))
    arrays = pickle.loads(settled(tmp_path, yaml).read_bytes())["model"]

    def loading(path, weights):
        path.write_bytes(pickle.dumps({"model": weights, "__author__": "x"}))
        return load_detector(config(yaml, path))

    with pytest.raises(PairmillError, match=r"1 missing: backbone.stem.conv1.weight"):
        loading(tmp_path / "less.pkl", {k: v for k, v in arrays.items() if k != "backbone.stem.conv1.weight"})
    with pytest.raises(PairmillError, match=r"Caffe2's names \(conv1_w"):
        loading(tmp_path / "caffe2.pkl", {"conv1_w": np.zeros(3), "res_conv1_bn_b": np.zeros(3)})
    with pytest.raises(PairmillError, match=r"has no `roi_heads.box_predictor.cls_score.weight`"):
        loading(tmp_path / "other.pkl", {"a.weight": np.zeros(3)})
    whole = {**arrays, "pixel_mean": np.zeros((3, 1, 1)), "roi_heads.mask_head.deconv.bias": np.zeros(2)}
    whole["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((15, 4))
    assert loading(tmp_path / "more.pkl", whole).feature_dim == 128
    yaml = settings(tmp_path, classes=CLASSES + 1)
    with pytest.raises(PairmillError, match=r"knows 7 classes, `detectron2:.*` 8"):
        load_detector(config(yaml, tmp_path / "small.pkl"))


def test_without_detectron2_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "detectron2.modeling", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(
        PairmillError, match=r"is not installed. Install it: pip install --no-build-isolation"
    ) as caught:
        load_detector(RegionsConfig(detector="detectron2:COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"))
    assert "rcnn:FPN" in str(caught.value)


def test_a_detectron2_that_does_not_start_is_told_apart(monkeypatch, tmp_path):
    broken = ModuleType("detectron2")
    broken.__path__ = [str(tmp_path)]
    (tmp_path / "modeling.py").write_text("import no_such_part_of_it\n")
    monkeypatch.delitem(sys.modules, "detectron2.modeling", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2", broken)
    with pytest.raises(PairmillError, match=r"cannot be imported .No module named 'no_such_part_of_it'"):
        load_detector(RegionsConfig(detector="detectron2:x.yaml"))


def near_boxes(detector):
    """How much features of two boxes differ that bf16 would round to one, as the runner calls it on a GPU."""
    boxes = torch.tensor([[140.6, 20.0, 170.6, 60.0], [141.4, 20.0, 171.4, 60.0]])
    with torch.autocast("cpu", torch.bfloat16):
        found = find_regions(detector, [picture(0, 112, 186)], [boxes])[0]
    return (found.features[0] - found.features[1]).abs().max()


@pytest.mark.parametrize("kind", ["C4", "FPN"])
def test_boxes_are_not_rounded_where_maps_are_of_half_precision(kind):
    weights = golden(f"d2_{kind.lower()}")[0].folder / "weights.safetensors"
    assert near_boxes(load_detector(_own(f"rcnn:{kind}", weights))) > 0


@pytest.mark.usefixtures("needs_detectron2")
def test_detectron2s_boxes_are_not_rounded_either(tmp_path):
    yaml = settings(tmp_path)
    assert near_boxes(load_detector(config(yaml, settled(tmp_path, yaml)))) > 0


@pytest.mark.parametrize(("case", "rules"), [(golden("d2_c4")[0], C4), (golden("d2_fpn")[0], FPN)], ids=["C4", "FPN"])
@torch.inference_mode()
def test_folded_normalisations_are_the_same_function(case, rules):
    _, state = read_butd(case.folder / "weights.safetensors", str(case))
    plain, folded = (build(state, rules, str(case), case.folder).eval().double() for _ in range(2))
    assert len(folded.fold().state_dict()) < len(plain.state_dict())
    image = torch.from_numpy(np.ascontiguousarray(picture(0).transpose(2, 0, 1)))
    batch = network_input([image], rules, plain.kind).double()
    boxes = torch.tensor([[0.0, 0.0, 60.0, 60.0], [10.0, 20.0, 90.0, 33.0]]).double()
    for a, b in zip(plain.maps(batch), folded.maps(batch), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)
    a, b = (model.features(model.pool(model.maps(batch), boxes)) for model in (plain, folded))
    assert a.abs().max() > 1
    assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)
